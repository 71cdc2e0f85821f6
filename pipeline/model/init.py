"""Weight initialisation: GPT-2's scheme and its knobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipeline.config import InitConfig
    from pipeline.model.gpt import GPT


@torch.no_grad()
def initialize(model: GPT, config: InitConfig, generator: torch.Generator) -> None:
    """Draw every weight of `model` in place, from `generator` and nothing else.

    Linear and embedding weights are N(0, config.std), biases 0, LayerNorm 1 and 0. With
    `residual_scale` the two `c_proj` that add to the residual stream in each of the L blocks get
    std * (2 L)^-0.5, so that the stream's variance does not grow with depth (Radford et al. 2019,
    section 2.3). The head is the token embedding, which is drawn once.

    With scheme `zero_projections` these two are 0, so that at first every block passes on what it
    gets (Zhang et al. 2019, Fixup); the weights that are drawn are those of scheme `gpt2`.

    Scheme `mup` draws for a model n times as wide as `config.mup_base` what scheme `gpt2` draws,
    the blocks' matrices times n^-0.5, and has 1 / n for the weight of `ln_f`; with the rates of
    `optimizers.parameter_groups` that is muP for Adam (Yang et al. 2022, Tensor Programs V,
    table 8, by which input and output weights may be tied). There the logits have a factor of 1 / n
    instead. A smaller `ln_f` is the same: as Adam's steps do not depend on the size of a gradient,
    a parameter times 1 / n, with its rate times 1 / n, goes the same way as the parameter behind a
    factor. So the model is an exact GPT-2 at every step. Heads are taken to be of one size.

    The position embedding takes config.std too: 0.02 is what the published HF configuration
    (`initializer_range`) and most reimplementations use. OpenAI's own code drew `wpe` with 0.01;
    one setting that means the same everywhere is easier to study.

    Rows of `wte` beyond the vocabulary are 0, and the others do not depend on how many there are.
    """
    narrowing = config.narrowing(model.config.n_embd)
    std = config.std * narrowing**0.5
    residual_std = std
    if config.residual_scale:
        residual_std *= (2 * model.config.n_layer) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(narrowing if name.endswith(".ln_f") else 1.0)
            module.bias.zero_()
        elif isinstance(module, nn.Linear):
            projection = name.endswith(".c_proj")
            _draw(module.weight, residual_std if projection else std, generator)
            if projection and config.scheme == "zero_projections":
                module.weight.zero_()
            module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            padded_from = model.config.vocab_size if name.endswith(".wte") else len(module.weight)
            _draw(module.weight[:padded_from], config.std, generator)
            module.weight[padded_from:].zero_()


def _draw(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill `weight` from N(0, std), drawn in fp32 on the generator's device."""
    drawn = torch.empty(weight.shape, dtype=torch.float32, device=generator.device)
    weight.copy_(drawn.normal_(0.0, std, generator=generator))
