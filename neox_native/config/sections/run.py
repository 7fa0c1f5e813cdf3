"""What surrounds training: where a run lives, what it saves, measures and writes down. See `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neox_native.config.ranges import Count


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
    ZeRO over all of dp, data-parallel ranks have no copies that could drift apart, but for frozen weights; with
    parallel.zero_shard_size, the groups hold the same shards, which are compared."""
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
