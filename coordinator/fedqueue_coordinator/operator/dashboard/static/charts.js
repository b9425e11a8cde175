// Small charts in SVG: lines over an axis, and bars. Every text is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 560, HEIGHT = 240, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 34;
export const COLOURS = 5;

function make(name, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}

/** Steps of 1, 2 or 5 times a power of ten, of at least `least` and about `count` of them, that cover low to high. */
export function ticks(low, high, count = 5, least = 0) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw && s >= least) ?? least;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

/** A number as people read it: 12 300 becomes 12.3k. */
export function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return String(+value.toPrecision(4));
}

function frame(label) {
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", "aria-label": label });
  return svg;
}

function axes(svg, x, y, xs, ys, xLabel) {
  for (const value of ys) {
    svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "grid-line" }));
    svg.append(make("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of xs) {
    svg.append(make("text", { x: x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, short(value)));
  }
  svg.append(make("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, xLabel));
}

/** Lines: series = [{name, points: [[x, y], …]}]; `target` is drawn as a dashed line, `nothing` said without a point. */
export function lines({ series, xLabel, label, target = null, fromZero = false, nothing = "Nothing to show yet." }) {
  const shown = series.map((s) => ({ ...s, points: s.points.filter(([, v]) => v !== null) })).filter((s) => s.points.length);
  const holder = document.createElement("div");
  if (!shown.length) {
    holder.append(Object.assign(document.createElement("p"), { className: "none", textContent: nothing }));
    return holder;
  }
  const all = shown.flatMap((s) => s.points), values = all.map(([, v]) => v);
  if (target !== null) values.push(target);
  if (fromZero) values.push(0);
  let [left, right] = [Math.min(...all.map(([v]) => v)), Math.max(...all.map(([v]) => v))];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (left === right) [left, right] = [left - 0.5, right + 0.5];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const x = (v) => LEFT + ((v - left) / (right - left)) * (WIDTH - LEFT - RIGHT);
  const y = (v) => HEIGHT - BOTTOM - ((v - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const last = shown.map((s) => `${s.name} ${short(s.points.at(-1)[1])}`).join(", ");
  const svg = frame(`${label}: ${last}`);
  axes(svg, x, y, ticks(left, right, 5, xLabel === "version" ? 1 : 0), ticks(low, high), xLabel);
  if (target !== null) svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(target), y2: y(target), class: "target" }));
  shown.forEach((s, i) => {
    const path = s.points.map(([px, py], n) => `${n ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
    const kind = `mark series-${i % COLOURS}`;
    svg.append(make("path", { d: path, class: kind }));
    if (s.points.length === 1) svg.append(make("circle", { cx: x(s.points[0][0]), cy: y(s.points[0][1]), r: 3, class: kind }));
  });
  const cursor = make("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "grid-line", visibility: "hidden" });
  const said = make("text", { y: TOP + 8, "text-anchor": "middle", visibility: "hidden" });
  svg.append(cursor, said);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = left + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (right - left);
    const near = shown.map((s) => s.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)));
    const where = x(near[0][0]);
    for (const [name, value] of [["x1", where], ["x2", where], ["visibility", "visible"]]) cursor.setAttribute(name, value);
    said.setAttribute("x", Math.min(Math.max(where, LEFT + 90), WIDTH - RIGHT - 90));
    said.setAttribute("visibility", "visible");
    said.textContent = `${xLabel} ${short(near[0][0])}: ` + near.map((p, i) => `${shown[i].name} ${short(p[1])}`).join(", ");
  });
  svg.addEventListener("pointerleave", () => [cursor, said].forEach((n) => n.setAttribute("visibility", "hidden")));
  holder.append(svg);
  if (shown.length > 1) {
    const legend = Object.assign(document.createElement("div"), { className: "legend" });
    shown.forEach((s, i) => {
      const entry = document.createElement("span");
      entry.append(Object.assign(document.createElement("i"), { className: `series-${i % COLOURS}` }), s.name);
      legend.append(entry);
    });
    holder.append(legend);
  }
  return holder;
}

/** Bars over 0, 1, 2, …; the last one stands for all larger values if `open`. */
export function bars({ counts, xLabel, label, open }) {
  const holder = document.createElement("div");
  if (!counts.length) {
    holder.append(Object.assign(document.createElement("p"), { className: "none", textContent: "Nothing to show yet." }));
    return holder;
  }
  const high = Math.max(...counts), space = (WIDTH - LEFT - RIGHT) / counts.length;
  const x = (v) => LEFT + (v + 0.5) * space, y = (v) => HEIGHT - BOTTOM - (v / high) * (HEIGHT - TOP - BOTTOM);
  const svg = frame(`${label}: ${counts.map((c, i) => `${i}: ${c}`).join(", ")}`);
  const every = Math.ceil(counts.length / 12);
  axes(svg, x, y, [], ticks(0, high, 4), xLabel);
  counts.forEach((count, i) => {
    const bar = make("rect", { x: x(i) - space * 0.4, width: space * 0.8, y: y(count), height: HEIGHT - BOTTOM - y(count), class: "bar" });
    bar.append(make("title", {}, `${i}: ${count}`));
    svg.append(bar);
    const name = open && i === counts.length - 1 ? `${i}+` : String(i);
    if (i % every === 0) svg.append(make("text", { x: x(i), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, name));
  });
  holder.append(svg);
  return holder;
}
