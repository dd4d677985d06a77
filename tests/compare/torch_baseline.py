"""An SRPO update in PyTorch, as a user of diffusers and transformers would write it from the paper: what ours is timed
against and compared with. Float32, on the CPU.

Tensors are as in those packages: pictures and latents [B, C, H, W], packed latents [B, N, 64].
"""

import dataclasses

import diffusers
import numpy as np
import torch
import transformers

from srpo_jax.algorithm import flow
from srpo_jax.algorithm.batch import Batch, Draws
from srpo_jax.algorithm.settings import Settings
from srpo_jax.families.flux import image_ids
from srpo_jax.program import Architecture
from srpo_jax.rewards.clip import MEAN, STD, TEMPERATURE_DIVISOR
from srpo_jax.weights import autoencoder, clip, engine, flux


@dataclasses.dataclass
class Inputs:
    """What an update is given: text features [B, T, C], pooled [B, P], noise [B, N, 64], grid positions mid [B], and
    the token ids [B, T'] of the captions with the wanted and the unwanted word."""

    text: torch.Tensor
    pooled: torch.Tensor
    noise: torch.Tensor
    mid: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor


def build(architecture: Architecture, params, frozen) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """The packages' transformer, autoencoder and CLIP (of one reward) with our parameters."""
    transformer = diffusers.FluxTransformer2DModel(**dataclasses.asdict(architecture.transformer))
    _load(transformer, engine.from_params(flux.diffusers_rules(architecture.transformer), params))
    sizes = architecture.autoencoder
    levels = len(sizes.block_out_channels)
    vae = diffusers.AutoencoderKL(
        **dataclasses.asdict(sizes), use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip
    _load(vae, engine.from_params(autoencoder.diffusers_rules(sizes), frozen.autoencoder))
    ((name, towers),) = architecture.rewards.items()
    values = dataclasses.asdict(towers)
    reward = transformers.CLIPModel(transformers.CLIPConfig(**values))
    _load(reward, engine.from_params(clip.hf_rules(towers), frozen.rewards[name]))
    return transformer.eval(), vae.eval().requires_grad_(False), reward.eval().requires_grad_(False)


def _load(model: torch.nn.Module, tensors: dict[str, np.ndarray]) -> None:
    found = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing), (missing, unexpected)


class Update:
    """One update of a recipe with one reward, in parts that can be timed alone.

    Args:
      settings: of the recipe (method srpo, released form).
      transformer, vae, reward: from ``build``; ``torch.compile`` may have been at them.
      optim: the ``optim`` part of a config.
    """

    def __init__(self, settings: Settings, transformer, vae, reward, kind: str, optim) -> None:
        self.settings, self.grid, self.kind = settings, settings.grid, kind
        self.transformer, self.vae, self.reward = transformer, vae, reward
        self.clip_norm = optim.clip_norm
        self.optimizer = torch.optim.AdamW(
            transformer.parameters(), lr=optim.learning_rate, betas=(optim.b1, optim.b2), eps=optim.eps,
            weight_decay=optim.weight_decay, fused=True,
        )  # fmt: skip
        self.image_ids = torch.from_numpy(image_ids(settings.height // 16, settings.width // 16))
        self.sigmas = flow.shifted_schedule(settings.rollout_steps, settings.shift)

    def velocity(self, x, inputs: Inputs, sigma, guidance: float):
        """The transformer at latents [B, N, 64] and noise levels [B]."""
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=inputs.text,
            pooled_projections=inputs.pooled,
            timestep=torch.floor(sigma * 1000) / 1000,
            guidance=torch.full((len(x),), guidance),
            img_ids=self.image_ids,
            txt_ids=torch.zeros(inputs.text.shape[1], 3),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def rollout(self, inputs: Inputs):
        """Clean latents [B, N, 64]."""
        x = inputs.noise
        for start, end in zip(self.sigmas[:-1].tolist(), self.sigmas[1:].tolist(), strict=True):
            level = torch.full((len(x),), start)
            x = x + (end - start) * self.velocity(x, inputs, level, self.settings.rollout_guidance)
        return x

    def decode(self, x):
        """Packed latents to the decoder's output [B, 3, H, W]."""
        rows, columns = self.settings.height // 16, self.settings.width // 16
        x = x.reshape(len(x), rows, columns, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(len(x), 16, 2 * rows, 2 * columns)
        config = self.vae.config
        return self.vae.decode(x / config.scaling_factor + config.shift_factor, return_dict=False)[0]

    def preprocess(self, decoded):
        """The decoder's output to what CLIP's vision tower reads."""
        size = self.reward.config.vision_config.image_size
        image = torch.clamp(decoded / 2 + 0.5, 0, 1)
        height, width = image.shape[-2:]
        short = min(height, width)
        if short != size:
            shape = size * height // short, size * width // short
            image = torch.nn.functional.interpolate(image, shape, mode="bicubic", antialias=True)
        top, left = round((image.shape[-2] - size) / 2), round((image.shape[-1] - size) / 2)
        image = image[..., top : top + size, left : left + size]
        return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def score(self, decoded, target):
        """The reward [B] of pictures by text directions [B, E]."""
        features = _unit(_features(self.reward.get_image_features(self.preprocess(decoded))))
        product = (features * target).sum(-1)
        if self.kind == "hps":
            return product
        return product * self.reward.logit_scale.exp() / TEMPERATURE_DIVISOR

    @torch.no_grad()
    def captions(self, inputs: Inputs):
        """Unit-norm text features of both captions, [B, E] each."""
        return [_unit(_features(self.reward.get_text_features(ids))) for ids in (inputs.positive, inputs.negative)]

    def terms(self, inputs: Inputs, texts):
        """Noise level to start from and to land on, and text direction, of each branch."""
        grid, length, mid = self.grid, self.grid.length, inputs.mid
        sigmas = torch.from_numpy(grid.sigmas)
        stride = torch.minimum(torch.minimum(length - mid, torch.tensor(grid.stride)), mid)
        start = torch.clamp(mid - stride, min=1)
        denoise = sigmas[length - torch.clamp(mid + stride, max=length)], sigmas[length - mid]
        inversion = sigmas[length - start], sigmas[length - torch.clamp(start + stride, max=length)]
        k_positive = torch.from_numpy(grid.discount_positive)[mid][:, None]
        k_negative = torch.from_numpy(grid.discount_negative)[start][:, None]
        positive, negative = texts
        yield *denoise, (1 + k_positive) * positive - negative
        yield *inversion, (1 + k_negative) * negative - positive

    def gradient(self, inputs: Inputs) -> list[float]:
        """Adds the gradient of both branches to the transformer's and returns their losses."""
        texts = self.captions(inputs)
        x0, noise, losses = self.rollout(inputs), inputs.noise, []
        for sigma_from, sigma_to, target in self.terms(inputs, texts):
            start, end = sigma_from[:, None, None], sigma_to[:, None, None]
            noisy = (1 - start) * x0 + start * noise
            v = self.velocity(noisy, inputs, sigma_from, self.settings.guidance)
            recovered = (noisy + (end - start) * v - end * noise) / (1 - end)
            reward = self.score(self.decode(recovered), target)
            loss = torch.relu(self.settings.margin - reward).mean() / 2
            loss.backward()
            losses.append(loss.item())
        return losses

    def optimize(self) -> None:
        """Clips the gradient that is there and lets AdamW use it."""
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), self.clip_norm)
        self.optimizer.step()

    def __call__(self, inputs: Inputs) -> list[float]:
        """The whole update."""
        losses = self.gradient(inputs)
        self.optimize()
        self.optimizer.zero_grad()
        return losses


def _features(found):
    """transformers 5 wraps features in an output object, earlier ones gave the tensor."""
    return found if isinstance(found, torch.Tensor) else found.pooler_output


def _unit(features):
    return features / features.norm(dim=-1, keepdim=True)


def inputs_of(batch: Batch, draws: Draws) -> Inputs:
    """The same inputs as ours."""
    (ids,) = batch.reward_tokens.values()
    given = batch.condition["text"], batch.condition["pooled"]
    arrays = (*given, draws.noise, draws.own, ids["positive"], ids["negative"])
    text, pooled, noise, mid, positive, negative = (torch.from_numpy(np.array(array)) for array in arrays)
    return Inputs(text, pooled, noise, mid.long(), positive.long(), negative.long())
