"""Weights that several processes share out (FSDP2, `fully_shard`), to train all those of a model
whose gradients and moments no card holds (Rajbhandari et al. 2020; Zhao et al. 2023).

Whole weights draw, are measured and saved, and wait for nobody. What learns is a twin of them, cut
into shards: a pass gathers one layer at a time, so does its way back, which leaves each process its
part of the mean gradient; AdamW moves shards, and whole weights are made of them again. While the
twin is at work there are none.

A pass of shards waits for those of the other processes, and these make other numbers of them, over
texts of their own. So each says what it is about to do, what comes first in the order of a
micro-batch is everybody's turn, and whoever is beyond it makes an empty pass, of one token and no
weight, as `torch.distributed.algorithms.Join` does for passes of other kinds of sharing.

Accelerate's flags decide that it is done, but not `Accelerator.prepare` does it, which has no FSDP
on processors, and makes a causal LM the unit that is called, where hidden states and logits are
asked for apart here, logits any number of times.
"""

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module
from transformers.modeling_layers import GradientCheckpointingLayer

from mdmrl.config import require

FORWARD, LOOK, REFERENCE, BACKWARD, DONE = range(5)  # in the order of a micro-batch


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, if that of `like` is one."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def gathered(shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors in the first process's main memory; all have to call it."""
    found = {}
    for name, shard in shards.items():
        whole = shard.full_tensor() if isinstance(shard, DTensor) else shard
        found[name] = whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)
    return found


class Sharding:
    """The shards of `model`, which has to stay as it is but for the values of its weights.

    Attributes:
        twin: the model that learns; parameters: its shards that are trained, by name.
    """

    def __init__(self, model: Module):
        # With it, transformers would load a policy's weights on the first process alone.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        self.mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
        self.whole = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.device, self.at_work, self.follows, self.ends = model.device, [], False, []
        self.twin = self.shared_out(model)
        named = self.twin.named_parameters()
        self.parameters = {name: shard for name, shard in named if shard.requires_grad}

    def shared_out(self, model: Module, frozen: bool = False) -> Module:
        """A copy of a whole model in shards; one that is `frozen` is a reference."""
        twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # until they are cut
        base = twin.base_model
        base.add_module("head", twin.get_output_embeddings())  # called any number of times a pass
        for layer in [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]:
            fully_shard(layer, mesh=self.mesh)
        fully_shard(base, mesh=self.mesh, reshard_after_forward=False)
        base.set_reshard_after_backward(False, recurse=False)
        del base.head
        if frozen:
            twin.requires_grad_(False)

        def before(*_) -> None:
            self.turn(REFERENCE if frozen else FORWARD if torch.is_grad_enabled() else LOOK)

        def after(base: Module, given, output) -> None:
            hidden = output.last_hidden_state
            if hidden.requires_grad:  # one position, so that every weight has a gradient
                self.ends.append(twin.get_output_embeddings()(hidden[-1:, -1:].float()))

        base.register_forward_pre_hook(before, prepend=True)
        base.register_forward_hook(after)
        return twin

    def turn(self, kind: int) -> None:
        """Come to `kind`, by way of what others have to do before."""
        if self.follows:
            return
        require(
            len(self.at_work) > 0,
            "a policy whose weights are shared out (FSDP), or its reference, is asked outside of "
            "policy.together(), where no other process answers",
        )
        while (now := self._first(kind)) != kind:
            self.follows = True
            if now == BACKWARD:
                self.backward()
            else:
                with torch.set_grad_enabled(now == FORWARD):
                    token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                    model = self.at_work[now == REFERENCE]
                    model.base_model(input_ids=token, attention_mask=token + 1, use_cache=False)
            self.follows = False

    def _first(self, kind: int) -> int:
        said = torch.tensor(kind, device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MIN)
        return int(said)

    def backward(self, loss: Tensor | None = None) -> None:
        """Add up the mean gradient of `loss` over processes; passes that it says nothing of take
        part in it."""
        self.turn(BACKWARD)
        ends, self.ends = self.ends, []
        slopes = [torch.zeros_like(end) for end in ends]
        if loss is not None and loss.requires_grad:
            ends, slopes = [loss, *ends], [torch.ones_like(loss), *slopes]
        if ends:
            torch.autograd.backward(ends, slopes)

    @contextlib.contextmanager
    def together(self, reference: Module | None) -> Iterator[None]:
        """Inside, shards are at work, those of the `reference` too, and whole weights are not."""
        with torch.no_grad():
            for name, shard in self.parameters.items():
                shard.copy_(cut(self.whole[name], shard))
                self.whole[name].data = torch.empty(0, device=self.device)
        self.at_work = [self.twin, reference] if reference else [self.twin]
        for model in self.at_work:
            model.base_model.unshard()
        yield
        self.turn(DONE)
        for model in self.at_work:
            model.base_model.reshard()
        self.at_work, self.ends = [], []
        self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """Make whole weights of the shards."""
        for name, shard in self.parameters.items():
            self.whole[name].data = shard.full_tensor()


class ShardedAdamW(torch.optim.AdamW):
    """AdamW of shards, whose state is taken and given whole, as `ZeroRedundancyOptimizer` does."""

    def __init__(self, groups: Iterable[dict], sharding: Sharding, **settings):
        super().__init__(groups, **settings)
        self.register_step_post_hook(lambda *_: sharding.gather())

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the state together on the first process, for `state_dict`."""
        held = super().state_dict()
        self.held = held | {"state": {i: gathered(state) for i, state in held["state"].items()}}

    def state_dict(self) -> dict:
        return self.held

    def load_state_dict(self, held: dict) -> None:
        shards = [shard for group in self.param_groups for shard in group["params"]]
        states = held["state"].items()
        cuts = {i: {n: cut(x, shards[i]) for n, x in state.items()} for i, state in states}
        super().load_state_dict(held | {"state": cuts})
