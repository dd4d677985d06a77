"""What to do about a plan: keys that make a recipe fit its devices, or that make it faster."""

import math
from typing import Any

import jax

from srpo_jax import sharding
from srpo_jax.algorithm.rollout import for_rollout
from srpo_jax.costs import keeping
from srpo_jax.costs.hardware import GIB
from srpo_jax.costs.plan import Candidate
from srpo_jax.models.compute import join, path_name
from srpo_jax.program import Program

FUSED = {"tpu": "splash", "gpu": "cudnn"}  # attention backend of a platform
# The training run's compiler optimises more than this one, and may plan this much more memory.
MARGIN = 0.5 * GIB
# JAX takes this share of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_DEFAULT_SHARE = 0.75


def rollout_bytes(built: Program) -> int:
    """Bytes of the transformer as the steps of a rollout read it, all of it in one place: without the modulations."""
    params = join(built.state.params, built.frozen.base)
    weights = jax.eval_shape(lambda params: for_rollout(built.networks, built.settings, params)[1], params)
    leaves, family = jax.tree_util.tree_leaves_with_path(weights), built.networks.family
    return sum(leaf.size * leaf.dtype.itemsize for path, leaf in leaves if not family.is_modulation(path_name(path)))


def advise(candidate: Candidate, report: dict[str, Any]) -> list[str]:
    """What makes a candidate fit, the cheapest first; of one that fits, what makes it faster."""
    config, target, memory = candidate.config, candidate.target, report["memory"]
    fused, advice = FUSED[target.platform], []
    samples = config.data.batch_size // config.optim.accumulation // sharding.batch_parts(candidate.built.mesh)
    if config.model.attention != fused and (fused != "cudnn" or config.model.dtype == "bfloat16"):
        advice.append(f"--config.model.attention={fused}: no attention matrix in memory, and faster")
    if report["fits"]:
        if memory["headroom"] < MARGIN:
            advice.append("little room: the training run's compiler optimises more, and may plan half a GiB more")
        if target.platform == "gpu" and memory["needed"] > GPU_DEFAULT_SHARE * memory["capacity"]:
            advice.append("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment: JAX takes 75 % of a GPU by default")
        if config.remat.transformer == "full":
            remat = keeping.choose(config, candidate.architecture, candidate.built.mesh, memory["headroom"])
            if remat != "full":
                advice.append(f"--config.remat.transformer={remat}: keep what there is room for, compute less again")
        # Every pass gathers the weights anew.
        bound = report["seconds"]["bound"] == "interconnect"
        if bound and config.data.images == "rollout" and not config.rollout.gather:
            whole = rollout_bytes(candidate.built)
            if whole < memory["headroom"]:
                advice.append(f"--config.rollout.gather=True: hold all weights in a rollout ({whole / GIB:.1f} GiB), "
                              "and gather them once, not at each of its steps")  # fmt: skip
        if bound and config.optim.accumulation > 1:
            advice.append("a smaller config.optim.accumulation, if it fits: fewer passes gather the weights")
        return advice
    for network in ("transformer", "autoencoder", "reward"):
        if config.remat[network] not in ("full", "auto"):
            advice.append(f"--config.remat.{network}=full: keep less for the backward pass")
    if config.optim.merge_terms:
        advice.append("--config.optim.merge_terms=False: the terms pass one after the other")
    if samples > 1:
        passes = config.optim.accumulation * samples
        advice.append(f"--config.optim.accumulation={passes}: one sample a device at a time, not {samples}")
    if memory["text_encoders"]:
        size = memory["text_encoders"] / GIB
        advice.append(f"--config.data.encode=stored: encode the prompts first ({size:.2f} GiB of text encoders)")
    if not config.lora.rank and config.optim.moments != "float8":
        advice.append("--config.optim.weights=bfloat16 --config.optim.moments=float8: weights and moments in 4 bytes a "
                      "parameter, not 12")  # fmt: skip
    if not config.optim.offload and target.platform == "tpu" and memory["arguments"]["optimizer"] > GIB:
        advice.append("--config.optim.offload=True: keep the moments in the hosts' memory "
                      f"({memory['arguments']['optimizer'] / GIB:.2f} GiB)")  # fmt: skip
    if config.optim.ema_decay:
        advice.append(f"--config.optim.ema_decay=0: no average of the weights ({memory['arguments']['ema'] / GIB:.2f} "
                      "GiB)")  # fmt: skip
    if candidate.built.mesh.shape["data"] > target.slices:
        advice.append(f"--config.mesh.data={target.slices} --config.mesh.fsdp=-1: split weights and optimiser state, "
                      "not copy them")  # fmt: skip
    if memory["headroom"] < 0:
        count = math.ceil(memory["needed"] / memory["capacity"] * report["devices"] / target.slices)
        where = " in each slice" if target.slices > 1 else ""
        least = 2 ** math.ceil(math.log2(count))
        advice.append(f"more devices along config.mesh.fsdp: at least {least} of this kind{where}")
        if samples <= 1 and candidate.built.mesh.shape["tensor"] == 1 and report["devices"] > 1:
            advice.append("--config.mesh.tensor=2: two devices share a sample's activations (for the same batch)")
        if not config.lora.rank:
            advice.append("--config.lora.rank=16: train low-rank factors, with no gradient and moments of the rest")
        elif config.lora.quantize != "nf4":
            advice.append("--config.lora.quantize=nf4: the frozen transformer in 4 bits (int8: in 8)")
    return advice
