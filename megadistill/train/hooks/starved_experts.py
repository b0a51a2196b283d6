"""Reports experts of the student that get hardly any tokens."""

from megadistill.models.experts import RouterCoefs
from megadistill.train.hooks.hook import StepEvent
from megadistill.train.resilience.anomalies import Anomaly
from megadistill.train.resilience.recovery import Recovery
from megadistill.train.router_losses import ExpertLoad, relative

STARVED_STEPS = 100
"""Steps whose tokens are counted together: a token of rare text may have experts of its own."""
STARVED_LOAD = 0.1
"""An expert with less than this fraction of an even load starves: it learns from a tenth of the tokens."""
USUAL_COEF = 0.01
"""Weight of the load-balancing loss that the Switch transformer and OLMoE were trained with."""
MAX_LISTED, MAX_IN_WORDS = 64, 3
"""Maximum number of experts in an event, and in its log line."""


class StarvedExperts:
    """Adds up the load of each expert over `STARVED_STEPS` steps; an expert is reported once, until it recovers."""

    def __init__(self, recovery: Recovery, coefs: RouterCoefs) -> None:
        self._recovery, self._coefs = recovery, coefs
        self._steps: list[ExpertLoad] = []
        self._starving: set[tuple[int, int]] = set()

    def after_step(self, event: StepEvent) -> None:
        if event.outcome.skipped or event.outcome.experts is None:
            return
        anomaly = self.update(event.step, event.outcome.experts)
        if anomaly is not None:
            self._recovery.events.warn(anomaly.event, anomaly.line, step=event.step, **anomaly.values)

    def update(self, step: int, load: ExpertLoad) -> Anomaly | None:
        """Takes a step's load."""
        self._steps.append(load)
        if len(self._steps) < STARVED_STEPS:
            return None
        summed = [
            [sum(each) for each in zip(*layer, strict=True)]
            for layer in zip(*(s.tokens for s in self._steps), strict=True)
        ]
        self._steps.clear()
        loads = [
            (share, layer, expert)
            for layer, shares in zip(load.layers, relative(summed), strict=True)
            for expert, share in enumerate(shares)
        ]
        starving = sorted(each for each in loads if each[0] < STARVED_LOAD)
        new = [each for each in starving if each[1:] not in self._starving]
        self._starving = {each[1:] for each in starving}
        if not new:
            return None
        return Anomaly("experts_starved", self._line(step, new, len(loads)), _values(new))

    def _line(self, step: int, new: list[tuple[float, int, int]], experts: int) -> str:
        listed = ", ".join(
            f"layer {layer} expert {expert} ({share:.1%})" for share, layer, expert in new[:MAX_IN_WORDS]
        )
        more = f" and {len(new) - MAX_IN_WORDS} more" if len(new) > MAX_IN_WORDS else ""
        coef = self._coefs.aux
        way_out = f"Raise loss.router_aux_loss_coef from {coef:g}"
        way_out += f" ({USUAL_COEF:g} is usual)" if coef < USUAL_COEF else " or lower train.optimizer.learning_rate"
        return (
            f"step {step}: {len(new)} of {experts} experts had less than {STARVED_LOAD:.0%} of an even share of the "
            f"tokens of {STARVED_STEPS} steps, and hardly learn: {listed}{more}. {way_out}, in a run that begins from "
            "a checkpoint of this one (run.begin_from) or from the start"
        )


def _values(new: list[tuple[float, int, int]]) -> dict[str, object]:
    experts = [{"layer": layer, "expert": expert, "load": round(share, 4)} for share, layer, expert in new[:MAX_LISTED]]
    return {"experts": experts, "count": len(new), "steps": STARVED_STEPS}
