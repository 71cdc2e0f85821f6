"""Rates leave out what is not training, and never borrow another card's peak."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from pipeline.compute import throughput
from pipeline.model.gpt import GPT, GPTConfig
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA H200", "fp8", 1978.9),
        ("NVIDIA A100-SXM4-40GB", "fp8", None),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("NVIDIA T400 4GB", "fp16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA H100 NVL", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("cpu (2 threads)", "fp32", None),
    ],
)
def test_the_peak_is_of_the_very_device_and_precision(name, precision, tflops) -> None:
    expected = tflops * 1e12 if tflops else None
    assert throughput.peak_flops(name, precision) == expected


def test_the_cost_of_the_first_steps_is_what_they_took_beyond_the_usual() -> None:
    assert throughput.warm_up_seconds([30.0, 1.5, 1.0, *[1.0] * 9]) == 29.5
    assert throughput.warm_up_seconds([1.0]) == 0.0
    assert throughput.warm_up_seconds([0.5, 0.5, 0.5, 1.0]) == 0.0, "never less than nothing"


def test_an_unknown_peak_gives_no_utilisation() -> None:
    assert throughput.utilisation(1000.0, 10**9, None) is None
    assert throughput.utilisation(1000.0, 10**9, 1e13) == pytest.approx(0.1)


def test_flops_per_token_are_the_published_figure_at_124m() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024))
    assert model.flops_per_token(1024) / 1e6 == pytest.approx(855.4, abs=0.1)


@pytest.mark.alone
def test_the_rate_leaves_out_warm_up_and_what_lies_between_steps() -> None:
    watch = throughput.Stopwatch(torch.device("cpu"))
    seconds = []
    for _ in range(2):
        watch.start()
        seconds.append(watch.stop())
        time.sleep(0.2)  # an evaluation, say
    assert sum(seconds) < 0.1
    assert throughput.tokens_per_second([9.0, 9.0, 9.0, 0.5, 0.5, 0.5, 7.0], 1000) == 2000
    assert throughput.tokens_per_second([0.5], 1000) == 2000


def test_peak_memory_grows_with_what_is_held() -> None:
    # A process of its own: the peak of this one is as high as the largest test before.
    script = """
import torch
from pipeline.compute.throughput import peak_memory_mib
before = peak_memory_mib(torch.device("cpu"))
held = torch.ones(600 * 2**18)  # 600 MiB, every page of it touched
grown = peak_memory_mib(torch.device("cpu")) - before
assert 400 < grown < 650, grown  # importing had a peak of its own
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
