"""What layers keep for their backward pass, and what is in work there, in bytes. Pure arithmetic, [Note: letters].

[Note: kept] The forward pass of a layer keeps for its backward pass: the input of each residual step, which sequence
parallelism divides; whole, in each step x̂, and what the norm's learned half makes of it for each kind; and what the kinds
state ([Note: costs]), divided by t where they are cut. The count, term by term, is that of Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", §4.1; what tensor and sequence parallelism divide is their
§4.2. It differs where this code does: flash attention keeps no scores, so that their 5 a s / h (a heads, s positions) is
gone but for one fp32 number for each head and position; masks of dropout are left out; queries and keys are kept also as
rotary embedding turned them; and with sequence parallelism what a projection reads stays whole, where theirs keeps a part
and gathers it again.
"""

from __future__ import annotations

from neox_native.config.schema import Config
from neox_native.dtypes import ELEMENT_BYTES, FP32_BYTES
from neox_native.model.kinds import residual_steps
from neox_native.plan.shares import Share, Sort, activation_bytes, layer_costs, stream_bytes


class Layer:
    """One layer and one microbatch, in bytes; its unit in elements of the matrix. See [Note: kept]."""

    def __init__(self, config: Config, sort: Sort, unit: int):
        kinds, forgets = sort
        model, training, t = config.model, config.training, config.parallel.tp
        whole, stream, e = activation_bytes(config), stream_bytes(config), ELEMENT_BYTES[training.precision]
        wide = e * training.micro_batch_size * model.seq_length  # one element per token
        costs = layer_costs(model, kinds, t)
        steps = len(residual_steps(kinds, model))
        comes_as_it_is = model.norm == "layernorm"  # RMSNorm keeps an fp32 copy of its input
        inside, dear = (
            sum(
                wide * kept.elements * (FP32_BYTES if kept.fp32 else e) // e // (t if kept.cut else 1)
                for each in costs
                for kept in each.kept
                if kept.dear >= only_dear and (config.data.document_attention or not kept.only_with_documents)
            )
            for only_dear in (False, True)
        )
        inputs = steps * (stream if comes_as_it_is else stream * FP32_BYTES // e)
        made = inputs + (steps + len(kinds)) * whole + inside
        last, output = costs[-1], costs[-1].products[-1]
        self.unit = unit
        # Results of output projections, and of their sums over tp, that the second pass comes to. See [Note: selective].
        beyond = 0 if model.hidden_dropout else 1
        dear += (len(kinds) - beyond) * whole + (steps - beyond) * stream * (t > 1)
        if config.compile.on:
            dear = int(training.activation_memory_budget * (made - stream * comes_as_it_is))
        present = made if comes_as_it_is else made + stream  # in its backward pass, where it forgets
        # Between its passes; and the part of it that is the layer's input as it came.
        self.kept = {"none": made, "selective": stream + dear, "full": stream}[forgets]
        self.input = 0 if forgets == "none" and not comes_as_it_is else stream
        self.recomputed = 0 if forgets == "none" else present - self.kept  # comes back during its backward pass
        # Gradients that the weight half of a split backward pass needs.
        self.waiting = sum(wide * each.opened for each in costs) // t + (steps + len(kinds)) * whole
        # In work at the end of the input half, where the layer is its stage's first.
        self.returning = wide * costs[0].returning // t + whole
        # The gradient with which its backward pass begins, of what the last kind's output projection reads; by how much those
        # of what that kind's projections of x̂ gave are wider; and the gradient of the output projection's weight.
        self.widest = wide * output.inner // t
        self.wider = wide * max(0, last.opened - output.inner) // t
        self.weight_gradient = e * output.inner * output.columns // t


class Stage:
    """One of a rank's stages, and its number; where it does not have the embedding or the readout, that has 0 elements."""

    def __init__(self, number: int, layers: list[Layer], embedding: int, readout: int):
        self.number, self.layers, self.embedding, self.readout = number, layers, embedding, readout
        self.kept = sum(layer.kept for layer in layers)  # of a microbatch
        self.recomputed = sum(layer.recomputed for layer in layers)  # by the input half of a split backward pass
        self.waiting = sum(layer.waiting for layer in layers)  # for the weight half, the readout's gradients left out
        self.elements = sum(layer.unit for layer in layers) + embedding + readout
        self.lingering = embedding or layers[0].unit  # reduced last: the matrix stays until the stage's next reduction


def stages_of(config: Config, share: Share) -> list[Stage]:
    """A rank's stages. Layers of one sort are one object."""
    units = [unit.world * unit.size for unit in share.units]
    embedding, readout = units.pop(0) if share.first else 0, units.pop() if share.last else 0
    stages = share.sorts(config.training)
    layers = [sort for stage in stages for sort in stage]
    sorts = {sort: Layer(config, sort, unit) for sort, unit in dict(zip(layers, units)).items()}
    last = max(share.stages)
    return [
        Stage(number, [sorts[each] for each in layers], embedding * (number == 0), readout * (number == last))
        for number, layers in zip(share.stages, stages)
    ]
