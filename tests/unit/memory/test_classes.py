"""The built-in kinds of card: what the planner and the prediction of speed rely on."""

from itertools import pairwise

from serve.memory.classes import BUILT_IN


def test_classes_are_known_by_their_memory_and_go_up() -> None:
    assert [each.name for each in BUILT_IN.values()] == list(BUILT_IN) == ["4gb", "8gb", "11gb", "24gb", "80gb"]
    assert [f"{each.memory_gb:g}gb" for each in BUILT_IN.values()] == list(BUILT_IN)
    for smaller, larger in pairwise(BUILT_IN.values()):
        assert smaller.memory_bytes < larger.memory_bytes
        assert smaller.tflops["float16"] < larger.tflops["float16"]


def test_a_class_has_the_speed_of_each_dtype_that_it_computes_in() -> None:
    for each in BUILT_IN.values():
        assert set(each.dtypes) == set(each.tflops)
        assert each.tflops["float16"] > each.tflops["float32"]
        assert each.bandwidth_gb_s is not None
        assert each.pcie_gb_s is not None
        assert each.bandwidth_gb_s > each.pcie_gb_s
        assert each.like
    assert "bfloat16" not in BUILT_IN["11gb"].dtypes
