"""Norms, products and activation of a layer: our kernels where the modules are plain, calls of the modules elsewhere.

Between the layers stands the residual stream `x: [T, hidden]` and, where a module was called that nobody could add to x
in passing, its output `delta: [T, hidden]`, which the next norm adds. A norm is a launch of its own, but for few tokens,
where the programs of the product behind it may each normalise them themselves (`at_once.py`).

Under autocast, products take and give 16 bits, and fp32 weights are rounded for them; x, norms and their weights stay as
they are. What a product takes is rounded by the norm before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_fastattn.autocast import region_dtype
from hf_fastattn.cache.batch import Batch
from hf_fastattn.graphs.weight_copies import WeightCopies
from hf_fastattn.kernels.launch import DTYPES, arch_of
from hf_fastattn.kernels.layer.activation import silu_and_mul
from hf_fastattn.kernels.layer.configs import FEW_TOKENS, MOST_TOKENS, beats_cublas
from hf_fastattn.kernels.layer.lora import Adapter, LoraSums
from hf_fastattn.kernels.layer.matvec import gate_up_silu, matvec
from hf_fastattn.kernels.layer.norm import MAX_HIDDEN, add_rms_norm, rms_norm
from hf_fastattn.kernels.layer.pushed_norm import pushed_norm
from hf_fastattn.kernels.layer.split_sums import SplitSums
from hf_fastattn.kernels.layer.summed_norm import summed_norm
from hf_fastattn.kernels.quantised import products as quantised
from hf_fastattn.kernels.rehearsal import is_under_way
from hf_fastattn.parallel.all_reduce import all_reduce, gather_columns
from hf_fastattn.parallel.later_sums import CopiedSums, LaterSum
from hf_fastattn.parallel.peer_memory import MOST_PUSHED, Delta, PeerMemory, PeerSum
from hf_fastattn.parallel.shards import GATHERED, ROWS, Shard
from hf_fastattn.parallel.shared_heads import HEADS
from hf_fastattn.patches.family import LayerNames
from hf_fastattn.patches.fused.adapter_stacks import TokenAdapters, add_by_row
from hf_fastattn.patches.fused.at_once import Held, product_at_once
from hf_fastattn.patches.modules.lora_modules import Adapted, adapted_parameters
from hf_fastattn.patches.modules.plain_modules import (
    is_plain_tensor,
    is_silu,
    linear_parameters,
    norm_eps,
    norm_weight,
    plain_shard,
)
from hf_fastattn.quantised.modules import QuantisedLinear, quantised_linear


class Products:
    """The operations on the tokens of one forward.

    Weights are taken from the modules at every call. A kernel may prefetch them before earlier launches have ended
    (`weights_settled`), since nothing in a forward writes weights.

    Args:
        names: of the layers' classes.
        leading: shape that called modules see, without its last dimension; T elements.
        device: of the tokens.
        copies: of weights that autocast would cast, if there are any.
        adapters: of the tokens, if they have more than the layers' single ones.
        hopper: experts may take Gluon kernels.
        peers: memory in which sums over ranks are made, if there is any.

    Attributes:
        later: makes these sums while other tokens are computed, if anything does.
        batch: whose attention runs between these products, if any does.
        adapters_fused: LoRA layers that our products took in so far.
        quantised_products: layers with quantised weights that were multiplied with by our kernels so far.
    """

    def __init__(
        self,
        names: LayerNames,
        leading: tuple[int, ...],
        device: torch.device,
        copies: WeightCopies | None = None,
        adapters: TokenAdapters | None = None,
        hopper: bool = False,
        peers: PeerMemory | None = None,
    ) -> None:
        self.names = names
        self.leading = leading
        self.hopper = hopper
        self.tokens = math.prod(leading)
        self._region, self._copies, self._tokens_adapters = region_dtype(device), copies, adapters
        self._by_row = None if adapters is None else adapters.names
        self.arch = arch_of(device)
        self._sums: SplitSums | None = None
        self._arrived: Tensor | None = None
        self._lora_sums = LoraSums(device)
        self.device = device
        self.adapters_fused = 0
        self.quantised_products = 0
        self._peers, self._slot = peers, 0
        self.later: CopiedSums | None = None
        self.batch: Batch | None = None

    @property
    def narrowed(self) -> bool:
        """Whether autocast has products in another dtype than that of their weights."""
        return self._region is not None

    def split_sums(self) -> SplitSums:
        """Room for split products; its counters are zeroed at most once a forward, by a launch that a graph records too."""
        if self._sums is None:
            self._sums = SplitSums(self.device)
        return self._sums

    def arrivals(self, count: int) -> Tensor:
        """`[count]` int32 zeros, which launches leave so; made once a forward, by a launch that a graph records too."""
        if self._arrived is None or len(self._arrived) < count:
            with torch.inference_mode(False):
                self._arrived = torch.zeros(count, dtype=torch.int32, device=self.device)
        return self._arrived

    @property
    def _launch(self) -> dict[str, Any]:
        return {
            "sums": self.split_sums() if self.tokens > 1 else None,
            "weights_settled": True,
            "asks_for_l1": self._asks_for_l1,
        }

    @property
    def _asks_for_l1(self) -> bool:
        """Whether launches ask for L1 cache: attention between them takes the memory that it is in."""
        return self.batch is not None and not self.batch.leaves_l1(self.device)

    def call(self, module: Callable[..., Any], x: Tensor) -> Tensor:
        """What the module makes of `x: [T, K]`, given to it as `[B, S, K]`; `[T, N]`."""
        out = module(x.view(*self.leading, -1))
        return (out[0] if isinstance(out, tuple) else out).reshape(self.tokens, -1)

    def norm_to(self, out: Tensor, module: Any, x: Tensor, delta: LaterSum | None) -> Tensor:
        """Write the norm of `x + delta` to `out`; returns the sum."""
        normed, total = self.norm(module, x, delta, out=out)
        if normed.data_ptr() != out.data_ptr():
            out.copy_(normed)
        return total

    def norm(
        self, module: Any, x: Tensor, delta: Delta, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The norm of `x + delta`, in `dtype` and in `out` where given and possible, and that sum."""
        weight = norm_weight(module, self.names.norm, x.device, (x.dtype,)) if x.shape[1] <= MAX_HIDDEN else None
        if isinstance(delta, PeerSum):
            if weight is not None and x.dtype in (delta.part.dtype, torch.float32):
                memory = delta.memory
                added: dict[str, Any] = {"bias": delta.bias, "unit_offset": self.names.unit_offset, "dtype": dtype}
                if memory.pushes(self.tokens):
                    return pushed_norm(
                        delta.part, memory.inboxes, MOST_PUSHED, memory.pushed, memory.late, memory.rank, x, weight,
                        norm_eps(module), **added,
                    )  # fmt: skip
                return summed_norm(
                    delta.part, memory.parts(delta.slot), memory.flags, memory.launches, memory.late, memory.rank, x, weight,
                    norm_eps(module), **added,
                )  # fmt: skip
            delta = self._sum_of(delta.part.clone(), delta.bias, delta.group)
        other = None
        if isinstance(delta, LaterSum):
            delta, other = delta.ready(apart=weight is not None and x.dtype in (delta.part.dtype, torch.float32))
        if weight is None or (delta is not None and delta.dtype is not x.dtype and x.dtype is not torch.float32):
            x = x if delta is None else x + delta
            return self.call(module, x), x
        options: dict[str, Any] = {"unit_offset": self.names.unit_offset, "weights_settled": True, "dtype": dtype}
        if delta is None:
            return rms_norm(x, weight, norm_eps(module), **options, out=out), x
        return add_rms_norm(delta, x, weight, norm_eps(module), **options, other=other, out=out)

    def project(self, norm: Any, linears: tuple[Any, ...], x: Tensor, delta: Delta) -> tuple[tuple[Tensor, ...], Tensor]:
        """The products of the norm of `x + delta` with several weights, `[T, N_i]` each, and the sum."""
        held = self._parameters(linears, x)
        at_once = self._at_once(held, x, delta, norm)
        if at_once is not None:
            assert held is not None
            return at_once.split([weight.shape[0] for weight in held.weights], -1), x
        normed, x = self.norm(norm, x, delta, None if held is None else self._dtype_of(x))
        return self._multiply(linears, held, normed), x

    def multiply_to(self, out: Tensor, linear: Any, x: Tensor) -> None:
        """Write the product of many tokens, `x: [T, K]`, with the weight of a layer to `out: [T, N]`."""
        held = linear_parameters(linear, x.device, (x.dtype,))
        if held is None or held[1] is not None or x.dtype is not out.dtype:
            out.copy_(self._apply(linear, x))
        else:
            torch.mm(x, held[0].t(), out=out)

    def multiply(self, linears: tuple[Any, ...], x: Tensor) -> tuple[Tensor, ...]:
        """The products of `x: [T, K]`, in the dtype of a product, with several weights, `[T, N_i]` each."""
        return self._multiply(linears, self._parameters(linears, x), x)

    def gated(self, norm: Any, gate: Any, up: Any, act_fn: nn.Module, x: Tensor, delta: Delta) -> tuple[Tensor, Tensor]:
        """`act_fn(gate) * up` of the norm of `x + delta`, `[T, I]`, and the sum."""
        held, silu, dtype = self._parameters((gate, up), x), is_silu(act_fn, x.device), self._dtype_of(x)
        at_once = self._at_once(held, x, delta, norm, gated=True) if silu else None
        if at_once is not None:
            return at_once, x
        normed, x = self.norm(norm, x, delta, None if held is None else dtype)
        if held is not None and silu and held.biases is None and normed.dtype is dtype:
            return gate_up_silu(normed, *held.weights, **self._options(held)), x
        pair = self._quantised((gate, up), normed) if silu and held is None else None
        if pair is not None and pair[0].bias is None and pair[1].bias is None and pair[0].weight.rows == pair[1].weight.rows:
            self.quantised_products += 2
            return quantised.gate_up_silu(normed, pair[0].weight, pair[1].weight, weights_settled=True), x
        left, right = self._multiply((gate, up), held, normed)
        # The activations of a long prompt are the largest here.
        del normed
        if silu and left.dtype is right.dtype and left.dtype in DTYPES and left.shape == right.shape:
            return silu_and_mul(left, right), x
        return self.call(act_fn, left) * right, x

    def add_product(self, linear: Any, states: Tensor, x: Tensor) -> tuple[Tensor, Delta]:
        """The residual stream with the product of `states: [T, K]` in it, or as it was and the product beside it."""
        part = plain_shard(linear)
        if part is not None and part.kind == ROWS:
            if self.later is not None:
                return x, self._begun(lambda out: self._product_of(part.weight, states, out=out), part.bias)
            return x, self._by_peers(part, states) or self._summed(part, states)
        dtype = self._dtype_of(states)
        held = self._parameters((linear,), states) if dtype is states.dtype and x.dtype in (dtype, torch.float32) else None
        if held is None:
            alone = self._quantised((linear,), states) if x.dtype in (states.dtype, torch.float32) else None
            return (x, self._apply(linear, states)) if alone is None else (self._launched(alone, states, x)[0], None)
        at_once = self._at_once(held, states, None, None, residual=x)
        if at_once is not None:
            return at_once, None
        return matvec(states, held.weights, held.biases, residual=x, **self._options(held))[0], None

    def product(self, linear: Any, x: Tensor) -> Tensor:
        """The product of `x: [T, K]` with the weight of a layer, `[T, N]`."""
        part = plain_shard(linear)
        if part is not None and part.kind == GATHERED:
            return self._gathered(part, x)
        held = self._parameters((linear,), x)
        if held is None or held.adapters is not None:
            alone = self._quantised((linear,), x)
            return self._apply(linear, x) if alone is None else self._launched(alone, x)[0]
        # The output layer has rows enough to keep every multiprocessor busy without split-K.
        return matvec(x.to(self._dtype_of(x)), held.weights, held.biases, weights_settled=True)[0]

    def summed_part(self, compute: Callable[[Tensor | None], Tensor], group: Any, like: Tensor) -> Delta:
        """The sum over ranks of `[T, H]` parts, at once, or left to the norm that adds it.

        Args:
            compute: gives this rank's part, where it was told to write it or elsewhere.
            like: of the shape and dtype of a part.
        """
        if self.later is not None:
            return self._begun(compute, None)
        memory = self._peers
        if memory is None or self.narrowed or not memory.takes(self.tokens, like.shape[1], like.dtype):
            return self._sum_of(compute(None), None, group)
        out, slot = self._in_slot(memory, compute)
        return PeerSum(memory, out, slot, None, group)

    def _summed(self, part: Shard, states: Tensor) -> Tensor:
        """The sum over ranks of the products of their `states: [T, K]`, and the bias once; `[T, N]`."""
        return self._sum_of(self._product_of(part.weight, states), part.bias, part.group)

    @staticmethod
    def _sum_of(product: Tensor, bias: Tensor | None, group: Any) -> Tensor:
        # In a rehearsal nothing is launched, so nothing may wait for other ranks.
        total = product if is_under_way() else all_reduce(product, group)
        return total if bias is None else total + bias.to(total.dtype)

    def _begun(self, compute: Callable[[Tensor | None], Tensor], bias: Tensor | None) -> LaterSum:
        """The same, under way; see `summed_part`."""
        later = self.later
        assert later is not None
        if is_under_way():
            part = compute(None)
            return LaterSum(part, torch.empty_like(part), bias, lambda: None)
        room = later.room(self.tokens)
        part = compute(room)
        if part.data_ptr() != room.data_ptr():
            part = room.copy_(part)
        return later.begin(part, bias)

    def _by_peers(self, part: Shard, states: Tensor) -> PeerSum | None:
        """The same, left to the norm that adds it; None if it is to be made at once."""
        memory, weight = self._peers, part.weight
        if memory is None or self.narrowed or not memory.takes(self.tokens, weight.shape[0], states.dtype):
            return None
        out, slot = self._in_slot(memory, lambda out: self._product_of(weight, states, out=out))
        return PeerSum(memory, out, slot, part.bias, part.group)

    def _in_slot(self, memory: PeerMemory, compute: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        """What is computed, in the slot whose turn it is, and the number of that."""
        slot, self._slot = self._slot, 1 - self._slot
        out = memory.part(slot, self.tokens)
        part = compute(out)
        # Nor may anything be written in a rehearsal, while another rank reads the slot.
        if part.data_ptr() != out.data_ptr() and not is_under_way():
            out.copy_(part)
        return out, slot

    def _at_once(
        self, held: Held | None, x: Tensor, delta: Delta, norm: Any, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor | None:
        """Few tokens' products with the weights of `held`, after the norm if there is one; None if that is not quicker."""
        if self.tokens > FEW_TOKENS or held is None or delta is not None or self.narrowed:
            return None
        weight = None if norm is None else norm_weight(norm, self.names.norm, x.device, (x.dtype,))
        if weight is None and norm is not None:
            return None
        eps = 0.0 if norm is None else norm_eps(norm)
        return product_at_once(
            self.arch, held, x, weight, eps, unit_offset=self.names.unit_offset, gated=gated, residual=residual,
            asks_for_l1=self._asks_for_l1,
        )  # fmt: skip

    def _gathered(self, part: Shard, x: Tensor) -> Tensor:
        """The products of `x: [T, K]` with all ranks' columns, `[T, N]`."""
        product = self._product_of(part.weight, x, part.bias, splits=False)
        return product.repeat(1, part.group.size()) if is_under_way() else gather_columns(product, part.group)

    def _product_of(
        self, weight: Tensor, x: Tensor, bias: Tensor | None = None, splits: bool = True, out: Tensor | None = None
    ) -> Tensor:
        """`x weight^T + bias` of a part of a layer, by our product, to `out`, where that pays.

        Args:
            splits: its sums, if there are few rows of the weight.
        """
        dtype = self._dtype_of(x)
        ours = self.tokens <= MOST_TOKENS and x.dtype is dtype and is_plain_tensor(weight, x.device, (dtype,))
        if ours and beats_cublas(self.arch, dtype.itemsize, self.tokens, x.shape[1], weight.shape[0], 1, False):
            options = self._launch if splits else {"weights_settled": True}
            return matvec(x, [weight], None if bias is None else [bias], **options, out=out)[0]
        if out is not None and bias is None and self._region is None and out.dtype is x.dtype is weight.dtype:
            return torch.mm(x, weight.t(), out=out)
        # Autocast, if it is on, casts all three.
        return functional.linear(x, weight, bias)

    def _dtype_of(self, x: Tensor) -> torch.dtype:
        """The dtype of a product of x."""
        return x.dtype if self._region is None else self._region

    def _parameters(self, linears: tuple[Any, ...], x: Tensor) -> Held | None:
        """What linear layers hold, if all are plain or LoRA, all with a bias or all without, and our product pays."""
        if self.tokens > MOST_TOKENS:
            return None
        weights, biases, adapters = [], [], []
        dtype = self._dtype_of(x)
        for linear in linears:
            held = self._adapted(linear, x.device, dtype)
            if held is None:
                return None
            adapter = self._adapter(linear, held)
            if held.members and adapter is None:
                return None
            weights.append(held.weight)
            adapters.append(adapter)
            if held.bias is not None:
                biases.append(held.bias)
        # One launch multiplies weights of one dtype, and shrinks with A of one dtype.
        dtypes = {adapter.a.dtype for adapter in adapters if adapter is not None}
        mixed = len(dtypes) > 1 or any(weight.dtype is not weights[0].dtype for weight in weights)
        if mixed or (biases and len(biases) < len(weights)):
            return None
        rows, adapted = sum(weight.shape[0] for weight in weights), bool(dtypes)
        # Of weights that autocast has to cast first, cuBLAS reads or writes every byte twice more.
        pays = weights[0].dtype is not dtype or beats_cublas(
            self.arch, dtype.itemsize, self.tokens, x.shape[1], rows, len(weights), adapted
        )
        return Held(weights, biases or None, adapters if adapted else None) if pays else None

    def _adapted(self, linear: Any, device: torch.device, dtype: torch.dtype) -> Adapted | None:
        """Weight, or its copy, bias and adapters of a linear layer whose products are in `dtype`."""
        dtypes = (dtype,) if self._region is None else (dtype, torch.float32)
        held = adapted_parameters(linear, device, dtypes, self._by_row)
        copy = None if held is None or self._copies is None else self._copies.get(held.weight)
        return held if held is None or copy is None else held._replace(weight=copy)

    def _adapter(self, linear: Any, held: Adapted) -> Adapter | None:
        """The adapters of a layer as one; None if it has none, or a kernel cannot take them."""
        given = self._tokens_adapters
        if given is not None and given.stacks is not None and held.members:
            return given.stacks.get(linear)
        return held.members[0][1] if len(held.members) == 1 and self._by_row is None else None

    def _apply(self, linear: Any, x: Tensor) -> Tensor:
        """The layer's product, `[T, N]`: with the copy of its weight if there is one, else by calling it."""
        part = plain_shard(linear)
        if part is not None and part.kind in (ROWS, GATHERED):
            return self._summed(part, x) if part.kind == ROWS else self._gathered(part, x)
        if part is not None and part.kind == HEADS:
            return self._product_of(part.weight, x, part.bias)
        dtype = self._dtype_of(x)
        held = None if self._copies is None and self._by_row is None else self._adapted(linear, x.device, dtype)
        if held is not None and self._by_row is not None and "base_layer" in linear._modules:
            # PEFT's own would want the rows as they were given, and find them by waiting for the device.
            assert self._tokens_adapters is not None
            product = self._apply(linear._modules["base_layer"], x)
            return add_by_row(product, x, held.members, self._tokens_adapters.numbers)
        if held is None or self._copies is None or held.weight.dtype is not dtype or held.members:
            return self._called(linear, x)
        return functional.linear(x.to(dtype), held.weight, None if held.bias is None else held.bias.to(dtype))

    def _called(self, linear: Any, x: Tensor) -> Tensor:
        """What calling the layer gives, `[T, N]`; of a plain one without the call, whose hooks take the host longer."""
        held = None if self.narrowed else linear_parameters(linear, x.device, (x.dtype,))
        return self.call(linear, x) if held is None else functional.linear(x, *held)

    def _multiply(self, linears: tuple[Any, ...], held: Held | None, x: Tensor) -> tuple[Tensor, ...]:
        # A norm that was called may have given another dtype.
        if held is None or x.dtype is not self._dtype_of(x):
            several = self._quantised(linears, x)
            if several is not None:
                return self._launched(several, x)
            return tuple(self._apply(linear, x) for linear in linears)
        return matvec(x, held.weights, held.biases, **self._options(held))

    def _quantised(self, linears: tuple[Any, ...], x: Tensor) -> list[QuantisedLinear] | None:
        """What linear layers hold, if a launch takes the quantised weights of all; all with a bias or all without."""
        if self.narrowed or self.tokens > MOST_TOKENS:
            return None
        found = []
        for linear in linears:
            held = quantised_linear(linear, x.device, x.dtype)
            if held is None or not quantised.pays(held.weight, self.tokens, x.dtype):
                return None
            found.append(held)
        whole = len({held.bias is None for held in found}) == 1 and quantised.alike([held.weight for held in found])
        return found if whole else None

    def _launched(self, linears: list[QuantisedLinear], x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The products with quantised weights, `[T, N_i]` each, and with the residual in the one of a single weight."""
        self.quantised_products += len(linears)
        biases = [held.bias for held in linears if held.bias is not None]
        weights = [held.weight for held in linears]
        return quantised.matvec(x, weights, biases or None, residual=residual, weights_settled=True)

    def _options(self, held: Held) -> dict[str, Any]:
        """Keywords of a product of ours."""
        if held.adapters is None:
            return self._launch
        self.adapters_fused += sum(adapter is not None for adapter in held.adapters)
        stacked = any(adapter is not None and adapter.members is not None for adapter in held.adapters)
        numbers = self._tokens_adapters.numbers if stacked and self._tokens_adapters is not None else None
        return {**self._launch, "lora": held.adapters, "lora_sums": self._lora_sums, "lora_numbers": numbers}
