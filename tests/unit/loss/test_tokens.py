"""The loss token by token against the reference's definitions, dense and in float64.

Legend: N tokens, U true vocabulary.
"""

from dataclasses import replace

import pytest
import torch

from megadistill.loss import Divergence, DivergenceKind, Head, LossOptions, VocabSlice, reference, token_terms
from megadistill.types import IGNORED_LABEL, LogitTransform
from tests.unit.loss.problems import Problem, problem

BENT = (LogitTransform(softcap=3.0, scale=0.7), LogitTransform(softcap=5.0))


def _whole(p: Problem) -> VocabSlice:
    return VocabSlice.contiguous(0, len(p.student_weight), size=p.size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("logits", [(LogitTransform(), LogitTransform()), BENT], ids=["plain", "softcaps"])
@pytest.mark.parametrize("memory", [1, 900, 1 << 20])
def test_each_token_is_what_the_reference_says(
    dtype: torch.dtype, logits: tuple[LogitTransform, LogitTransform], memory: int
) -> None:
    p = problem(3, tokens=29)
    student, teacher = logits
    p = replace(p, student_logits=student, teacher_logits=teacher)
    p_s = reference.logits(p.student, p.size).log_softmax(dim=1)
    p_t = reference.logits(p.teacher, p.size).log_softmax(dim=1)
    p = p.cast(dtype)
    options = LossOptions(logit_memory=memory)
    found = token_terms(p.student, p.labels, vocab=_whole(p), teacher=p.teacher, options=options)
    assert found.teacher is not None
    expected = {
        "cross_entropy": reference.label_ce(p_s, p.labels),
        "confidence": p_s.exp().amax(dim=1),
        "correct": (p_s.argmax(dim=1) == p.labels).double(),
        "kl": reference.kl(p_t, p_s),
        "jsd": reference.divergence_value(p_t, p_s, Divergence(DivergenceKind.JSD)),
        "acceptance": torch.minimum(p_t.exp(), p_s.exp()).sum(dim=1),
        "agreement": (p_t.argmax(dim=1) == p_s.argmax(dim=1)).double(),
        "entropy": reference.entropy(p_s),
        "teacher_cross_entropy": reference.label_ce(p_t, p.labels),
    }
    against = vars(found.teacher)
    values = {**against, **vars(found), "teacher_cross_entropy": against["cross_entropy"]}
    assert 0 < expected["agreement"].sum() < 29, "a case that tells the two apart"
    assert (p.labels == IGNORED_LABEL).any()
    for name, truth in expected.items():
        assert values[name].dtype == dtype
        torch.testing.assert_close(values[name].double(), truth, rtol=0, atol=1e-12 if dtype == torch.float64 else 5e-6)


def test_a_hit_is_a_hit_and_without_a_teacher_there_is_none() -> None:
    p = problem(4, tokens=17)
    best = (p.student_hidden @ p.student_weight[: p.size].T).argmax(dim=1)
    labels = torch.where(torch.arange(17) % 2 == 0, best, (best + 1) % p.size)
    found = token_terms(p.student, labels, vocab=_whole(p))
    assert found.teacher is None
    assert found.correct.tolist() == [1.0, 0.0] * 8 + [1.0]
    nothing = token_terms(Head(p.student_hidden[:0], p.student_weight), labels[:0], vocab=_whole(p))
    assert nothing.cross_entropy.shape == (0,)
    with pytest.raises(ValueError, match="do not fit"):
        token_terms(Head(p.student_hidden[1:], p.student_weight), labels, vocab=_whole(p))
