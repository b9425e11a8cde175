// The page: asks for runs, follows one by server-sent events, and draws it. Foreign text is always set as text.
import { bars, lines, short } from "/static/charts.js";

const main = document.getElementById("main"), nav = document.getElementById("nav");
const connection = document.getElementById("connection");
const WORDS = { well: "● well", watch: "▲ look", wrong: "✖ broken", ended: "■ ended" };
const NOT_EVALUATED = "No version was evaluated yet. The coordinator evaluates where the task has test_data().";
const ORDER = ["wrong", "watch", "well", "ended"];
const MOST_STALENESS = 20;
let source = null, timer = null, filter = "", every = false;

function node(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function say(text, lost = false) {
  if (connection.textContent !== text) connection.textContent = text;
  connection.classList.toggle("lost", lost);
}

const LOST = "the page has lost its server: start fedqueue dashboard again";

async function read(path) {
  let answer;
  try { answer = await fetch(path); } catch { throw new Error(LOST); }
  if (answer.status === 401) { location.assign("/login"); throw new Error("logged out"); }
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

function level(kind) { return node("span", { className: `level ${kind}` }, WORDS[kind] ?? kind); }

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 90) return `${+seconds.toPrecision(3)} s`;
  if (seconds < 5400) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${+(seconds / 3600).toPrecision(3)} h`;
}

function share(value) { return value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`; }

function card(title, ...content) { return node("section", { className: "card" }, node("h2", {}, title), ...content); }

function tile(value, name) { return node("div", { className: "tile" }, node("b", {}, String(value)), node("span", {}, name)); }

function verdict(run) {
  const words = { well: "Well", watch: "Have a look", wrong: "Broken", ended: "Ended" };
  return node("div", { className: `verdict ${run.level}`, role: "status" },
    node("strong", { className: run.level }, words[run.level]), node("span", {}, run.says));
}

function counts(map) {
  const entries = Object.entries(map).filter(([, count]) => count);
  return entries.map(([name, count]) => `${name} ${count}`).join(", ") || "–";
}

// The list of runs

async function showRuns() {
  document.title = "fedqueue";
  draw([node("h1", {}, "Runs"), node("p", { className: "none" }, "Reading …")]);
  const chosen = new Set();
  const refresh = async () => {
    let runs;
    try { runs = await read("/api/runs"); } catch (error) { say(error.message, true); return; }
    say("live");
    const compare = node("button", { type: "button", disabled: chosen.size < 2 }, "Compare the chosen runs");
    compare.addEventListener("click", () => { location.hash = `#/compare/${[...chosen].map(encodeURIComponent).join(",")}`; });
    const rows = runs.map((run) => {
      const box = node("input", { type: "checkbox", checked: chosen.has(run.run), ariaLabel: `Compare ${run.run}` });
      box.addEventListener("change", () => {
        box.checked ? chosen.add(run.run) : chosen.delete(run.run);
        compare.disabled = chosen.size < 2;
      });
      const [name, value] = Object.entries(run.metric ?? {})[0] ?? ["", null];
      const number = (text, label) => {
        const made = node("td", { className: "number" }, text);
        made.dataset.label = label;
        return made;
      };
      return node("tr", {}, node("td", {}, box),
        node("td", { className: "name" }, node("a", { href: `#/run/${encodeURIComponent(run.run)}` }, run.run)),
        node("td", {}, level(run.level)), node("td", { className: "says" }, run.says),
        number(short(run.version), "Version"), number(short(run.updates), "Updates"),
        number(name ? `${name} ${short(value)}` : "–", "Metric"), node("td", {}, run.where ?? ""));
    });
    const heads = ["Choose", "Run", "State", "What it does, or who has to do what", "Version", "Updates", "Metric", "Where"];
    const table = node("div", { className: "scroll" }, node("table", { className: "stacked" },
      node("thead", {}, node("tr", {}, ...heads.map((h, i) => node("th", { scope: "col", className: i > 3 && i < 7 ? "number" : "" }, h)))),
      node("tbody", {}, ...rows)));
    const none = node("p", {}, "No run yet. ", node("code", {}, "fedqueue run CONFIG.toml"), " starts one; it appears here by itself.");
    if (!main.contains(document.activeElement) || document.activeElement === main) {
      draw([node("h1", {}, "Runs"), runs.length ? node("div", { className: "card" }, table) : none,
        runs.length > 1 ? node("p", {}, compare) : null]);
    }
  };
  await refresh();
  timer = setInterval(refresh, 3000);
}

// One run

function follow(name, part) {
  document.title = `${name} – fedqueue`;
  const base = `#/run/${encodeURIComponent(name)}`;
  tabs([[base, "Overview", part === ""], [`${base}/sites`, "Sites", part === "sites"], [`${base}/privacy`, "Privacy", part === "privacy"]]);
  draw([node("h1", {}, name), node("p", { className: "none" }, "Reading …")]);
  source = new EventSource(`/api/runs/${encodeURIComponent(name)}/events`);
  source.addEventListener("message", (event) => {
    const run = JSON.parse(event.data);
    if (run.error) { say(run.error, true); return; }
    say(run.state === "running" ? "live" : "from its results");
    const parts = { "": overview, sites, privacy };
    (parts[part] ?? overview)(run);
  });
  source.addEventListener("error", () => {
    say(LOST, true);
    read("/api/runs").then(() => say("live")).catch(() => {});
  });
}

function overview(run) {
  const target = run.target[run.main_metric] ?? null;
  const [name, ...others] = [run.main_metric, ...Object.keys(run.metrics).filter((m) => m !== run.main_metric)];
  const goal = target === null ? null : Array.isArray(target) ? target[0] : Number.isFinite(target) ? target : null;
  const curves = (metric, goalLine) => {
    const series = [{ name: metric, points: run.metrics[metric] ?? [] }];
    return lines({ series, xLabel: "version", label: metric, target: goalLine, nothing: NOT_EVALUATED });
  };
  const worst = [...run.clients].sort(byLevel).slice(0, 8);
  replace([
    node("h1", {}, run.run), verdict(run),
    node("div", { className: "tiles" }, tile(short(run.version), "version"), tile(short(run.updates), "updates merged"),
      tile(duration(run.seconds), "since the start"),
      run.state === "running" ? tile(`${run.alive} of ${run.clients.length}`, "sites alive") : tile(run.clients.length, "sites"),
      tile(duration(run.usual_seconds), "for a version"),
      tile(name ? short(run.newest_metrics[name]) : "–", name || "no metric"),
      tile(Object.entries(run.rejected).reduce((sum, [why, n]) => sum + (why === "run_ended" ? 0 : n), 0), "updates rejected")),
    node("div", { className: "grid" },
      card(name ? `${name}, by version` : "Metrics", curves(name, goal)),
      ...others.slice(0, 1).map((other) => card(`${other}, by version`, curves(other, null))),
      card("Versions and updates in time", lines({ series: [{ name: "updates", points: run.arrivals }, { name: "versions", points: run.versions }],
        xLabel: "seconds", label: "Versions and updates in time", fromZero: true })),
      card("Staleness of merged updates, in versions", bars({ counts: run.staleness, xLabel: "staleness", label: "Updates by staleness",
        open: run.staleness.length > MOST_STALENESS }))),
    card("Sites that need somebody first", siteTable(worst, run), run.clients.length > worst.length
      ? node("p", {}, node("a", { href: `#/run/${encodeURIComponent(run.run)}/sites` }, `All ${run.clients.length} sites`)) : null),
    node("p", {}),
    node("div", { className: "grid" },
      card("What went wrong, newest first", eventList(run.events)),
      card("Counts", node("dl", {}, node("dt", {}, "updates rejected"), node("dd", {}, counts(run.rejected)),
        node("dt", {}, "jobs abandoned"), node("dd", {}, counts(run.abandoned)),
        node("dt", {}, "strategy"), node("dd", {}, run.strategy ?? "–"), node("dt", {}, "coordinator"), node("dd", {}, run.leader || "–"),
        node("dt", {}, "where"), node("dd", {}, run.where)))),
  ]);
}

function eventList(events) {
  if (!events.length) return node("p", { className: "none" }, "Nothing.");
  return node("ol", { className: "events", tabIndex: 0, ariaLabel: "What went wrong" }, ...events.map((event) => node("li", {},
    node("span", { className: "when" }, duration(event.at)), node("b", {}, event.client ? `${event.client}: ` : ""), event.what,
    event.text ? ` – ${event.text}` : "")));
}

function byLevel(a, b) {
  return ORDER.indexOf(a.level) - ORDER.indexOf(b.level) || a.merged - b.merged || a.name.localeCompare(b.name);
}

const COLUMNS = ["State", "Site", "What it does, or who has to do what", "Updates", "Share", "Staleness", "Job", "Norm", "Rejected"];

function siteTable(clients, run) {
  const heads = COLUMNS;
  const cell = (text, label) => node("td", { className: "number" }, Object.assign(node("span", {}), { textContent: text }), label ? "" : "");
  const rows = clients.map((site) => {
    const numbers = [short(site.merged), share(site.share), site.staleness ?? "–", duration(site.seconds),
      site.relative_norm ? `${short(+site.relative_norm.toPrecision(2))}×` : "–",
      Object.values(site.rejected).reduce((a, b) => a + b, 0) || "–"];
    return node("tr", {}, node("td", {}, level(site.level)), node("td", { className: "name" }, site.name),
      node("td", { className: "says" }, site.says), ...numbers.map((text, i) => {
        const made = cell(String(text));
        made.dataset.label = heads[i + 3];
        return made;
      }));
  });
  return node("div", { className: "scroll" }, node("table", { className: "stacked" },
    node("thead", {}, node("tr", {}, ...heads.map((h, i) => node("th", { scope: "col", className: i > 2 ? "number" : "" }, h)))),
    node("tbody", {}, ...rows)));
}

const AT_FIRST = 200;

function sites(run) {
  let box = document.getElementById("filter");
  if (!box) {
    box = node("input", { id: "filter", type: "search", value: filter, placeholder: "name or state", ariaLabel: "Show only sites that contain" });
    box.addEventListener("input", () => { filter = box.value; listSites(latest); });
    const all = node("input", { id: "all", type: "checkbox", checked: every });
    all.addEventListener("change", () => { every = all.checked; listSites(latest); });
    replace([node("h1", {}, run.run), node("div", { id: "verdict" }),
      node("div", { className: "controls" }, node("label", { htmlFor: "filter" }, "Filter"), box,
        node("label", {}, all, " show all"), node("span", { id: "shown", className: "none" })),
      node("div", { className: "card", id: "list" }),
      node("p", { className: "none" }, "Norm: the length of a site's updates beside that of the median site. Job: seconds of training. " +
        "What left a site is in the log that the site itself keeps (security.egress_log).")]);
  }
  listSites(run);
}

let latest = null;

function listSites(run) {
  latest = run;
  const word = filter.toLowerCase();
  const found = run.clients.filter((s) => `${s.name} ${WORDS[s.level]} ${s.says}`.toLowerCase().includes(word)).sort(byLevel);
  const some = every ? found : found.slice(0, AT_FIRST);
  document.getElementById("verdict").replaceChildren(verdict(run));
  document.getElementById("shown").textContent = `${some.length} of ${run.clients.length} sites`;
  document.getElementById("list").replaceChildren(siteTable(some, run));
}

function privacy(run) {
  const spent = run.privacy, known = Object.keys(spent).length > 0;
  const keepers = [...new Set([...run.named_keepers, ...Object.keys(run.keepers)])];
  replace([node("h1", {}, run.run), verdict(run), node("div", { className: "grid" },
    card("Keepers", keepers.length ? node("dl", {}, ...keepers.flatMap((k) => [node("dt", {}, k), node("dd", {}, `${run.keepers[k] ?? 0} cohorts released`)]),
      node("dt", {}, "smallest cohort"), node("dd", {}, `${run.smallest_cohort ?? "–"} sites${run.min_cohort ? `, at least ${run.min_cohort}` : ""}`))
      : node("p", {}, "None: the coordinator reads each site's update. ", node("code", {}, "[secure]"), " hides it in sums.")),
    card("Differential privacy", known ? node("dl", {}, ...Object.entries(spent).filter(([, v]) => typeof v !== "object")
      .flatMap(([k, v]) => [node("dt", {}, k.replaceAll("_", " ")), node("dd", {}, typeof v === "number" ? short(v) : String(v))]))
      : node("p", {}, run.privacy_sentence || "No ε in the ledger: rows are accounted for by each site itself, in its own file."),
    run.epsilon.length ? lines({ series: [{ name: "ε of the site that spent most", points: run.epsilon }], xLabel: "version", label: "ε", fromZero: true }) : null,
    known ? epsilonTable(run.clients) : null,
    node("p", { className: "none" }, "Not covered by any ε: who trained when, durations, failures, bytes, registered examples.")))]);
}

const SPENT_MOST = 20;

function epsilonTable(clients) {
  const most = [...clients].sort((a, b) => b.epsilon - a.epsilon || a.name.localeCompare(b.name)).slice(0, SPENT_MOST);
  return node("table", {}, node("thead", {}, node("tr", {}, node("th", { scope: "col" }, "Site that spent most"),
    node("th", { scope: "col", className: "number" }, "ε"))),
  node("tbody", {}, ...most.map((site) => node("tr", {}, node("td", { className: "name" }, site.name),
    node("td", { className: "number" }, short(site.epsilon))))));
}

// Several runs

async function showComparison(names) {
  document.title = "Comparison – fedqueue";
  draw([node("h1", {}, "Comparison"), node("p", { className: "none" }, "Reading …")]);
  const runs = [];
  for (const name of names) {
    try { runs.push(await read(`/api/runs/${encodeURIComponent(name)}`)); } catch (error) { say(error.message, true); }
  }
  const metrics = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))];
  const versionAt = (run, version) => run.versions.findLast(([, v]) => v <= version)?.[0] ?? 0;
  const charts = metrics.flatMap((metric) => [
    card(`${metric}, by version`, lines({ series: runs.map((r) => ({ name: r.run, points: r.metrics[metric] ?? [] })), xLabel: "version", label: metric })),
    card(`${metric}, by seconds`, lines({ series: runs.map((r) => ({ name: r.run, points: (r.metrics[metric] ?? []).map(([v, m]) => [versionAt(r, v), m]) })),
      xLabel: "seconds", label: metric })),
  ]);
  const fields = [["state", (r) => r.says], ["strategy", (r) => r.strategy ?? "–"], ["versions", (r) => short(r.version)], ["updates", (r) => short(r.updates)],
    ["seconds", (r) => duration(r.seconds)], ["mean staleness", (r) => { const n = r.staleness.reduce((a, b) => a + b, 0);
      return n ? short(r.staleness.reduce((a, c, i) => a + i * c, 0) / n) : "–"; }], ["rejected", (r) => counts(r.rejected)],
    ...metrics.map((m) => [m, (r) => short(r.newest_metrics[m])])];
  draw([node("h1", {}, `Comparison of ${runs.length} runs`), node("div", { className: "card wide scroll" }, node("table", {},
    node("thead", {}, node("tr", {}, node("th", { scope: "col" }, ""), ...runs.map((r) => node("th", { scope: "col" }, r.run)))),
    node("tbody", {}, ...fields.map(([name, of]) => node("tr", {}, node("th", { scope: "row" }, name), ...runs.map((r) => node("td", {}, of(r)))))))),
    node("div", { className: "grid" }, ...charts)]);
}

// Where the page is

function draw(content) { main.replaceChildren(...content.filter(Boolean)); }

function replace(content) {
  const top = window.scrollY, events = main.querySelector("ol.events")?.scrollTop ?? 0;
  draw(content);
  window.scrollTo(0, top);
  const list = main.querySelector("ol.events");
  if (list) list.scrollTop = events;
}

function tabs(entries) {
  nav.replaceChildren(...[["#/", "Runs", entries.length === 0], ...entries].map(([href, text, here]) => {
    const link = node("a", { href }, text);
    if (here) link.setAttribute("aria-current", "page");
    return link;
  }));
}

function route() {
  source?.close();
  source = null;
  clearInterval(timer);
  say("");
  const [, kind = "", name = "", part = ""] = location.hash.split("/");
  if (kind === "run" && name) { follow(decodeURIComponent(name), part); return; }
  tabs([]);
  if (kind === "compare" && name) showComparison(name.split(",").map(decodeURIComponent)); else showRuns();
}

window.addEventListener("hashchange", () => { route(); main.focus(); });
route();
