"""Steps whose tokens have no label at all, from which a student learns nothing."""

import logging

from megadistill.errors import OperatorFault
from megadistill.train.hooks.hook import StepEvent
from megadistill.train.setup.setup import Setup

logger = logging.getLogger(__name__)


class UnlabelledGuard:
    """Ends a run whose first step has no label, or too many steps in a row; warns of each of the others."""

    def __init__(self, setup: Setup, *, max_in_a_row: int) -> None:
        self._setup, self._max_in_a_row = setup, max_in_a_row
        self._in_a_row, self._has_learned = 0, False

    def after_step(self, event: StepEvent) -> None:
        """
        Raises:
            OperatorFault: the first step of this attempt has no label, or more than `max_in_a_row` steps in a row.
        """
        if event.outcome.labels:
            self._in_a_row, self._has_learned = 0, True
            return
        self._in_a_row += 1
        reason = unlabelled(event.shape.tokens, document_mask=self._setup.recipe.data.document_mask)
        if not self._has_learned or self._in_a_row > self._max_in_a_row:
            raise OperatorFault(f"step {event.step}: {reason}")
        logger.warning("step %d: %s", event.step, reason)


def unlabelled(tokens: int, *, document_mask: bool) -> str:
    """The reason, and the way out, for a number of tokens of which none has a label."""
    causes = "documents of one token" if document_mask else "padding, or samples that cannot be read"
    return (
        f"none of its {tokens:,} tokens has a label, so the student learns nothing from it: they are {causes} "
        "(`megadistill shards verify` reads them all): give other data"
    )
