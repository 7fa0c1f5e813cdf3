"""Every setting of a run: one frozen dataclass per TOML section.

The string under each field is its documentation; `train.py --help` prints it. Units stand in brackets.
A field whose name is a Python keyword carries a trailing underscore here and none in TOML (`async_` is `async`).
A number's range stands in its type (`ranges.py`); with none there, it is zero or more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from neox_native.config.ranges import BelowOne, Count, CountOrRest, Positive, Range, Share, at_least_one


@dataclass(frozen=True)
class Run:
    """Where a run lives and how repeatable it is."""

    dir: str = "runs/default"
    """Folder of the run: resolved config, metrics, TensorBoard files and checkpoints."""
    seed: int = 1234
    """Seed of everything random; each use derives its own stream from this number and a name."""
    determinism: Literal["fast", "bitwise", "elastic"] = "fast"
    """"bitwise" repeats every number exactly at a fixed layout, through a kill and a resume; "elastic" repeats it in every
    layout of the same tp and micro batch size, through resumes that change the layout; "fast" lets kernels choose."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; "auto" takes a GPU where there is one."""
    watchdog_factor: float = 50.0
    """A rank without progress for this many median steps is a hang: positions and stacks are printed, the job ends; 0: never."""
    watchdog_min_seconds: float = 120.0
    """A training step is never called a hang before this time [seconds]."""
    watchdog_startup_seconds: float = 1800.0
    """Limit of what has no step time: opening data, the first steps, which compile, evaluation and saving [seconds]. A
    process that stands still is noticed after 300 seconds, whatever it does."""
    check_replicas_every: int = 0
    """Compare what replicas hold alike after every so many steps and before each save, by hash; 0 never does [steps]. With
    ZeRO, data-parallel ranks have no copies that could drift apart, but for frozen weights."""
    profile: str = ""
    """"10:13" profiles steps 10, 11 and 12, the end left out as in a slice: in the folder `profile` of the run, each rank writes
    a Chrome trace, for ui.perfetto.dev, and a table of its dearest kernels. Those steps are slower. Empty: none [steps]."""
    memory_history: bool = False
    """On a GPU, note the Python stack of every allocation, microseconds each, for the snapshot written when memory runs out."""

    @property
    def profiled_steps(self) -> range:
        """The steps of `profile`."""
        first, _, end = self.profile.partition(":")
        return range(int(first), int(end)) if self.profile else range(0)


@dataclass(frozen=True)
class Model:
    """The NeoX decoder."""

    num_layers: Annotated[int, at_least_one(10_000)] = 6
    """Transformer blocks."""
    hidden_size: Annotated[int, at_least_one(1 << 20)] = 512
    """Width of the residual stream [channels]."""
    num_heads: Annotated[int, at_least_one(1 << 20)] = 8
    """Attention heads; must divide hidden_size."""
    num_kv_heads: Annotated[int, Range(largest=1 << 20)] = 0
    """Key and value heads for grouped-query attention; 0 means num_heads (multi-head attention). Where they are fewer
    than parallel.tp, each lies on several ranks."""
    ffn_hidden_size: Annotated[int, Range(largest=1 << 23)] = 0
    """Width of the feed-forward layer [channels]; 0 means 4 * hidden_size."""
    seq_length: Annotated[int, at_least_one(1 << 24)] = 2048
    """Sequence length of training [tokens]."""
    vocab_size: Annotated[int, at_least_one((1 << 31) - 1)] = 50277
    """Token ids that data may contain: 0 .. vocab_size - 1."""
    vocab_multiple_of: Annotated[int, at_least_one(1 << 20)] = 128
    """The embedding and the head have vocab_size rounded up to a multiple of this many rows, whatever the mesh."""
    pattern: list[str] = field(default_factory=lambda: ["attention+feed_forward"], hash=False)
    """Layer kinds of each layer, repeated over the layers: "attention+feed_forward" has both in one layer, joined in one
    residual step with parallel_residual, else one after the other."""
    pos_emb: Literal["rotary", "learned", "sinusoidal", "alibi", "none"] = "rotary"
    """Position embedding."""
    rotary_pct: Share = 0.25
    """Share of each head's channels that rotary embedding turns [fraction]."""
    rotary_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    parallel_residual: bool = True
    """True: x + attention(norm1(x)) + mlp(norm2(x)); False: the kinds of a layer one after the other."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation."""
    norm_eps: Positive = 1e-5
    """Added to the variance inside the normalisation."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "geglu", "swiglu", "reglu"] = "gelu"
    """Activation of the feed-forward layer; geglu, swiglu and reglu add a gate projection."""
    attention_bias: bool = True
    """Biases on the query-key-value and the attention output projections."""
    mlp_bias: bool = True
    """Biases on the feed-forward projections."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    hidden_dropout: BelowOne = 0.0
    """Dropout on the embedding and on what is added to the residual stream: with parallel_residual the sum of attention and
    feed-forward, else each of them [probability]."""
    attention_dropout: BelowOne = 0.0
    """Dropout on attention weights [probability]."""
    init: Literal["small_init", "wang_init", "normal", "scaled_normal"] = "small_init"
    """Initialisation of embeddings, query-key-value, MLP-in and head."""
    output_init: Literal["small_init", "wang_init", "normal", "scaled_normal"] = "wang_init"
    """Initialisation of attention-out and MLP-out."""
    init_std: float = 0.02
    """Standard deviation of "normal" and "scaled_normal"."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return -(-self.vocab_size // self.vocab_multiple_of) * self.vocab_multiple_of

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_size(self) -> int:
        """Feed-forward width, resolved [channels]."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate projection."""
        return self.activation in ("geglu", "swiglu", "reglu")


@dataclass(frozen=True)
class Data:
    """What the model reads, and in which order."""

    train: str | list[dict] = "builtin:python-stdlib"
    """Training data: a prefix of .idx/.bin files, "builtin:python-stdlib", or a list of {path, weight, labels} to blend;
    labels, which may be left out, is the prefix of files with -100 where a token is not to be predicted."""
    valid: str | list[dict] = ""
    """Validation data; empty takes the second part of `split` of the training data."""
    split: str = "969,30,1"
    """Shares of training and validation documents where they come from the same files; nothing reads a third share."""
    tokenizer: str = "byte"
    """Tokenizer that made the data: "byte", a Hugging Face tokenizer.json, or "tiktoken:gpt2" and its like."""
    order: Literal["neox", "epoch", "stored"] = "neox"
    """Order of the samples: "neox" is GPT-NeoX's, to the token, and where a run is made longer than that, further epochs
    follow, drawn anew; "epoch" shuffles each epoch on its own, so that a longer run continues a shorter one; "stored" takes
    rows of seq_length + 1 tokens as they lie (Pythia's preshuffled data)."""
    packing: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    """How documents fill a row: end to end, whole documents while they fit, or one document; the last two pad."""
    document_attention: bool = False
    """Tokens attend within their own document only: FlexAttention on a GPU (without dropout and ALiBi), else a mask."""
    document_positions: bool = False
    """Positions restart at 0 with each document."""
    cache_dir: str = "~/.cache/neox_native"
    """Folder of built-in corpora, prepared once per machine, and of orders of 1e7 samples or documents and more (4 bytes
    a sample, 12 a document and epoch), which nothing removes: it may be deleted between runs, and is made again."""


@dataclass(frozen=True)
class Training:
    """The optimisation loop."""

    steps: Count = 1000
    """Optimizer updates of the whole run [steps]."""
    global_batch_size: Count = 32
    """Sequences per update over all ranks [sequences]."""
    micro_batch_size: Count = 4
    """Sequences per forward pass of one rank [sequences]."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of parameters and activations; bf16 and fp16 keep fp32 master weights and accumulate gradients in fp32. With
    run.determinism "fast", GPUs multiply fp32 matrices in TF32."""
    clip_grad_norm: float = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a block recomputes in its backward pass: "selective" all that is cheap, "full" all but its input (4/3 of the FLOPs)."""
    activation_memory_budget: Share = 0.5
    """"selective" in compiled blocks: the share of what "none" keeps that they keep; torch chooses what they recompute [fraction]."""
    recompute_every: Count = 1
    """Only every so many-th block recomputes, the others keep all [blocks]."""
    loss_slice_tokens: Count = 512
    """Tokens of a microbatch that have logits at a time; longer slices cost memory, and a GPU fewer passes over fp32 sums [tokens]."""
    initial_loss_scale: Positive = 4096.0
    """fp16: first dynamic loss scale, of the mean loss of a microbatch."""
    loss_scale_window: Count = 1000
    """fp16: steps without overflow after which the loss scale doubles [steps]."""
    loss_scale_hysteresis: Count = 2
    """fp16: overflows since the loss scale last doubled from which on each one halves it [steps]."""
    min_loss_scale: Positive = 1.0
    """fp16: smallest loss scale."""
    max_bad_steps: int = 20
    """More steps in a row than this that are not finite, or spikes, end the run, its state saved; a restart with the same
    settings does not train on. 0: never [steps]. They are counted on logged steps and, where those are further apart, every
    max_bad_steps + 1 steps, which waits for the device once: such a row ends after 2 * max_bad_steps + 1 of them at the latest."""
    spike_threshold: float = 0.0
    """Skip the update of a loss this many standard deviations above the last ones; 0 skips none."""
    spike_window: Count = 128
    """Losses that `spike_threshold` looks back at [steps]."""

    def num_microbatches(self, dp: int) -> int:
        """Microbatches of a step on each of dp data-parallel ranks, whose number must divide the batch (`layout_rules.batch`)."""
        return self.global_batch_size // (self.micro_batch_size * dp)

    def forgets(self, layer: int) -> str:
        """What layer number `layer` of the whole model recomputes: "none", "selective" or "full"."""
        return "none" if (layer + 1) % self.recompute_every else self.activation_checkpointing


@dataclass(frozen=True)
class Optimizer:
    """The update rule. Biases and norms are never decayed."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Update rule."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: list[BelowOne] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates of the two moments."""
    eps: Positive = 1e-8
    """AdamW's term in the denominator."""
    weight_decay: float = 0.1
    """Weight decay: decoupled for AdamW (Loshchilov & Hutter 2019), added to the gradient for SGD."""
    momentum: BelowOne = 0.9
    """SGD's momentum."""


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    kind: str = "next_token"
    """How the model's value of each token becomes the loss: "next_token", the mean negative log-likelihood of the targets."""


@dataclass(frozen=True)
class LrSchedule:
    """Learning rate over the steps, update for update GPT-NeoX's: update k has the schedule's value after k - 1 updates, so
    that with warmup the first has rate zero; a step that overflows in fp16 does not count."""

    kind: Literal["cosine", "linear", "exponential", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after warmup."""
    warmup_fraction: Share = 0.01
    """Share of decay_steps in which the rate rises linearly from zero [fraction]."""
    decay_steps: int = 0
    """Steps over which the schedule's shape extends; 0 means training.steps [steps]."""
    min_lr: float = 0.0
    """Rate that cosine and wsd end at and that no schedule falls below after warmup."""
    cooldown_fraction: Share = 0.1
    """wsd: share of decay_steps in which the rate falls at the end [fraction]."""


@dataclass(frozen=True)
class Parallel:
    """How the ranks are laid out: pp * dp * tp = number of ranks. What cuts along an axis is ignored where it has one rank:
    schedule and stages at pp 1, zero_stage at dp 1, sequence_parallel at tp 1."""

    pp: Count = 1
    """Pipeline-parallel degree [ranks]."""
    dp: CountOrRest = -1
    """Data-parallel degree [ranks]; -1 takes the ranks that pp and tp leave."""
    tp: Count = 1
    """Tensor-parallel degree [ranks]."""
    sequence_parallel: bool = False
    """Shard norms, residual stream and dropout along the sequence over the tp axis."""
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv"] = "1f1b"
    """Order of forward and backward passes in the pipeline."""
    virtual_stages: Count = 1
    """Stages per pipeline rank; looped schedules take 2 or more."""
    stage_layers: list[Count] = field(default_factory=list)
    """Layers of each stage, first to last; empty lets the code balance them, embedding and head weighed in."""
    zero_stage: Annotated[int, Range("between 0 and 3", lambda number: 0 <= number <= 3)] = 0
    """ZeRO stage: 0 keeps everything, 1 shards optimizer state, 2 also gradients, 3 also parameters, over dp."""


@dataclass(frozen=True)
class Compile:
    """torch.compile."""

    enabled: bool = False
    """Compile each block."""


@dataclass(frozen=True)
class Checkpoint:
    """Saving and resuming."""

    save_every: int = 0
    """Save after every so many steps; 0 saves only at the end [steps]."""
    save_steps: str | list[int] = ""
    """More steps to save at: a list, or "pythia" for 0, 1, 2, 4, ... 512 and every 1000."""
    keep_last: int = 0
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for ever [steps]; 0 exempts none."""
    resume: str = "auto"
    """"auto" continues the run folder's newest complete checkpoint, "none" starts anew, else the path of a checkpoint."""
    initialize_from: str = ""
    """Path of a checkpoint whose weights alone start a new run (fine-tuning); a run that resumes ignores it. The vocabulary
    may be larger: rows of new tokens start as a new model's."""
    async_: bool = False
    """Write in a background thread while training goes on; costs a copy of the state in host memory."""
    export: Literal["none", "fp32", "bf16"] = "none"
    """After the last step, also write the weights alone, in this type, to the folder `weights` of the run."""
    export_hf_every: int = 0
    """Also write a Hugging Face folder, `hugging_face/step_...` of the run, every so many steps and at the end; 0 never [steps]."""


@dataclass(frozen=True)
class Evaluation:
    """Loss on the validation split."""

    every: int = 0
    """Evaluate after every so many steps and at the end; 0 never does [steps]."""
    batches: Count = 10
    """Global batches per evaluation."""
    rotate: bool = False
    """Each evaluation reads the next stretch of the validation data, as GPT-NeoX's do; false: all read the same samples, so
    that their losses compare, whatever training.steps is."""


@dataclass(frozen=True)
class Logging:
    """What is written down."""

    every: Count = 10
    """Log after every so many steps; nothing waits for the device in between, but for training.max_bad_steps [steps]."""
    tensorboard: bool = True
    """Write TensorBoard scalars beside metrics.jsonl."""
    stragglers_every: int = 100
    """Name each pipeline stage's slowest rank after every so many steps; 0 never does [steps]."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: Run = Run()
    model: Model = Model()
    data: Data = field(default_factory=Data)
    training: Training = Training()
    objective: Objective = Objective()
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_schedule: LrSchedule = LrSchedule()
    parallel: Parallel = field(default_factory=Parallel)
    compile: Compile = Compile()
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
