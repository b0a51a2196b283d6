"""Kinds of GPU: the file that comes with the package, a file of one's own, and devices by their names."""

from pathlib import Path

import pytest

from megadistill.accelerators import accelerator, accelerator_of, accelerators
from megadistill.errors import UserError

MINE = """\
lumi:
  name: half an MI250X
  peak_tflops: {bfloat16: 191.5}
  memory_gb: 64
  memory_gb_per_s: 1638
  node_gb_per_s: 50
  network_gb_per_s: 12.5
  source: measured
"""


def test_the_units_of_the_data_sheet_become_bytes_and_flops() -> None:
    h100 = accelerator("h100")
    assert (h100.peak_flops("bfloat16"), h100.peak_flops("float32")) == (989e12, 67e12)
    assert h100.memory_bytes == 80_000_000_000
    assert (h100.node_bandwidth, h100.network_bandwidth) == (450e9, 50e9)


def test_every_kind_is_complete_and_matched_by_its_devices() -> None:
    for name, kind in accelerators().items():
        assert kind.peak_flops("bfloat16") > kind.peak_flops("float32"), name
        assert kind.node_bandwidth > kind.network_bandwidth, name
        assert kind.devices, name
        for device in kind.devices:
            assert accelerator_of(f"Vendor {device} more") == kind, name


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_of_several_parts_of_a_name_the_longest_decides(device: str, kind: str) -> None:
    assert accelerator_of(device) == accelerators()[kind]


def test_float8_is_of_kinds_that_multiply_the_e4m3_of_a_float8_teacher() -> None:
    """Ampere has none; an MI300X has another e4m3, with other exponents."""
    known = {name for name, kind in accelerators().items() if kind.multiplies_float8}
    assert known == {"h100", "h100-pcie", "h200", "b200", "l40s"}


def test_an_unknown_device_is_no_kind() -> None:
    assert accelerator_of("Tesla V100-SXM2-16GB") is None


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    assert accelerator(str(path)).memory_bytes == 64_000_000_000
    with pytest.raises(UserError, match="float32, and for half an MI250X only the peaks of bfloat16"):
        accelerator(str(path)).peak_flops("float32")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINE.replace("memory_gb: 64", "memory_gb: 0"), r"lumi\.memory_gb: .* 0"),
        (MINE.replace("memory_gb:", "memory:"), r"lumi\.memory_gb: field required"),
        (MINE.replace("memory_gb_per_s: 1638", ""), r"lumi\.memory_gb_per_s: field required"),
        (MINE + "  watts: 500\n", r"lumi\.watts"),
        (MINE + MINE.replace("lumi", "frontier"), "describes 2 kinds"),
        ("- 1\n", "holds no kind"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_a_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as refused:
        accelerator(str(path))
    assert "\n" not in str(refused.value)


def test_a_kind_that_nobody_knows() -> None:
    with pytest.raises(UserError, match=r"--gpu h10: no such kind; did you mean 'h100'"):
        accelerator("h10")
    with pytest.raises(UserError, match=r"missing\.yaml: no such file"):
        accelerator("missing.yaml")
