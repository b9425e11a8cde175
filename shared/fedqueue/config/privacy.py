"""The section `[privacy]`: differential privacy of what leaves a site."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedqueue.config.sections import OFF, Count, Section, Text, refuse

NO_PRIVACY = "no differential privacy"


class ExamplePrivacyConfig(Section):
    """Differential privacy of each row, by DP-SGD at the site (docs/how-to/row-privacy.md). The coordinator sends these
    settings with each job. Off unless `noise_multiplier` or `epsilon` is set."""

    max_grad_norm: Annotated[Annotated[float, Field(ge=1e-6, le=1e6)] | None, OFF] = None
    """The gradient of each row, over all trainable parameters, is scaled down to at most this L2 norm (C). Required."""
    noise_multiplier: Annotated[Annotated[float, Field(ge=1e-3, le=1e5)] | None, OFF] = None
    """Standard deviation of the Gaussian noise in each step, as a multiple of `max_grad_norm`: σ = z · C."""
    epsilon: Annotated[Annotated[float, Field(gt=0, le=1000)] | None, OFF] = None
    """Instead of `noise_multiplier`: each site takes the smallest noise with which `jobs` jobs of one client cost at
    most this ε, and refuses the jobs of the run that would cost more."""
    jobs: Annotated[Count | None, OFF] = None
    """With `epsilon`: how many jobs of one client ε has to suffice for."""
    delta: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, OFF] = None
    """The δ of the guarantee: well below 1 divided by the rows of the largest client. Required."""
    backend: Literal["vmap", "loop"] = "vmap"
    """How the gradients of single rows are computed: together by `torch.func.vmap`, or one after the other. A loss
    that `vmap` cannot take is computed row by row anyway."""

    @property
    def on(self) -> bool:
        """Whether rows are protected."""
        return self.noise_multiplier is not None or self.epsilon is not None

    @model_validator(mode="after")
    def _complete(self) -> ExamplePrivacyConfig:
        if not self.on:
            given = [name for name in ("max_grad_norm", "delta", "jobs") if getattr(self, name) is not None]
            if given:
                raise refuse(
                    f"sets {', '.join(given)} but no noise, so that nothing would be private",
                    "set noise_multiplier, or epsilon and jobs",
                )
            return self
        if self.noise_multiplier is not None and self.epsilon is not None:
            raise refuse("sets both noise_multiplier and epsilon", "leave one of them out: each determines the other")
        if self.epsilon is not None and self.jobs is None:
            raise refuse(
                "epsilon needs jobs, because each further job of a client costs more",
                "set jobs to the number of jobs that a client may train in this run",
            )
        if self.epsilon is None and self.jobs is not None:
            raise refuse("jobs has no effect without epsilon", "leave jobs out, or set epsilon in place of the noise")
        for name, hint in (
            ("max_grad_norm", "set it, for example to 1.0; it bounds what one row can change"),
            ("delta", "set it well below 1 divided by the rows of the largest client, for example to 1e-5"),
        ):
            if getattr(self, name) is None:
                raise refuse(f"{name} is missing", hint)
        return self

    @property
    def sentence(self) -> str:
        """What holds for the updates of a run with these settings."""
        if not self.on:
            return NO_PRIVACY
        noise = (
            f"noise multiplier {self.noise_multiplier:g}"
            if self.noise_multiplier
            else f"noise for ε = {self.epsilon:g} in {self.jobs} jobs of a client"
        )
        return f"rows: {noise}, norm {self.clip_norm:g}, δ = {self.at_delta:g}; each site keeps its own account of ε"

    @property
    def clip_norm(self) -> float:
        """The largest norm of a row's gradient: `max_grad_norm` of settings that are on."""
        assert self.max_grad_norm is not None
        return self.max_grad_norm

    @property
    def at_delta(self) -> float:
        """The δ of settings that are on."""
        assert self.delta is not None
        return self.delta


class ClientPrivacyConfig(Section):
    """Differential privacy of a client's whole contribution: each site clips its update, and each keeper adds noise to
    the sum (docs/privacy.md). Needs keepers. Off unless two of `noise_multiplier`, `epsilon` and `max_participations`
    are set, which determine the third."""

    clip_norm: Annotated[Annotated[float, Field(ge=1e-6, le=1e6)] | None, OFF] = None
    """The L2 norm that a client's delta is scaled down to where it is longer (C), in place of `secure.clip_norm`.
    Required."""
    noise_multiplier: Annotated[Annotated[float, Field(ge=1e-3, le=1e4)] | None, OFF] = None
    """Standard deviation of each keeper's noise, as a multiple of the largest change that one client can make to a
    version's sum (z)."""
    epsilon: Annotated[Annotated[float, Field(gt=0, le=1000)] | None, OFF] = None
    """The most that one client may spend in the run (ε). A client that has spent it trains no more."""
    max_participations: Annotated[Count | None, OFF] = None
    """How many fresh updates of one client ε pays for. A stale update costs less."""
    delta: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, OFF] = None
    """The δ of the guarantee: well below 1 divided by the number of clients. Required."""
    on_budget: Literal["turn_away", "stop"] = "turn_away"
    """`turn_away`: a client that has used up its budget gets no further job, and the run goes on with the others while
    they are enough; `stop`: the run ends once the first client has, so that no client's data weighs more than
    another's."""

    @property
    def on(self) -> bool:
        """Whether clients are protected."""
        return self.noise_multiplier is not None or self.epsilon is not None

    @model_validator(mode="after")
    def _complete(self) -> ClientPrivacyConfig:
        set_ = [name for name in type(self).model_fields if name != "on_budget" and getattr(self, name) is not None]
        if not set_:
            if self.on_budget != "turn_away":
                raise refuse("on_budget has no effect without noise", "leave it out, or set the noise as well")
            return self
        of_three = [name for name in ("noise_multiplier", "epsilon", "max_participations") if name in set_]
        if len(of_three) != 2:
            raise refuse(
                f"sets {', '.join(of_three) or 'none'} of noise_multiplier, epsilon and max_participations",
                "set exactly two of them: they determine the third",
            )
        for name, hint in (
            ("clip_norm", "set it near the norm of a client's delta, for example to 1.0"),
            ("delta", "set it well below 1 divided by the number of clients, for example to 1e-5"),
        ):
            if name not in set_:
                raise refuse(f"{name} is missing", hint)
        return self

    @property
    def at_delta(self) -> float:
        """The δ of settings that are on."""
        assert self.delta is not None
        return self.delta

    @property
    def sentence(self) -> str:
        """What holds for the updates of a run with these settings, which are on."""
        fresh = f"{self.max_participations} fresh updates of a client"
        if self.noise_multiplier is None:
            what = f"noise for ε = {self.epsilon:g} in {fresh}"
        else:
            most = f"ε = {self.epsilon:g} of a client" if self.epsilon else fresh
            what = f"noise multiplier {self.noise_multiplier:g}, at most {most}"
        return f"clients: {what}, norm {self.clip_norm:g}, δ = {self.at_delta:g}; each keeper adds its own noise"


class PrivacyConfig(Section):
    """Differential privacy of what leaves a site."""

    folder: Text = Field(default="privacy", exclude=True)
    """`fedqueue-worker`: folder of this site's accounts, `privacy-CLIENT.json`, which say how much privacy each
    client's rows have spent. With a deleted account, what was spent is forgotten."""
    examples: ExamplePrivacyConfig = ExamplePrivacyConfig()
    clients: ClientPrivacyConfig = ClientPrivacyConfig()

    @property
    def sentence(self) -> str:
        """What holds for the updates of a run with these settings."""
        return "; ".join(kind.sentence for kind in (self.examples, self.clients) if kind.on) or NO_PRIVACY
