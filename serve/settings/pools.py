"""Settings of models and of the pools that compute: encoders, diffusion on its classes of GPUs, captions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from serve.rungs import Rung, worse
from serve.settings.room import MOST_STEPS, Device, Dtype, Room, RungName


class ModelSettings(Room):
    source: str = "shapes"
    """Model to serve: `shapes` (shipped), a diffusers folder, a `.safetensors` checkpoint, or a hub id."""
    revision: str | None = None
    """Hub revision; required for a hub id, as a full commit hash, so that every replica loads the same weights."""
    name: str | None = None
    """Name that requests use in `model`; by default the last part of the source."""
    config: str | None = None
    """For a single-file checkpoint: a diffusers folder or hub id whose configuration and tokenizer describe it, and
    which has the parts that the file lacks (of SD 3 and FLUX usually all but the transformer)."""
    num_inference_steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Steps of a request that names none; by default what the model is made for."""
    guidance_scale: float | None = Field(None, ge=0)
    """Guidance scale of a request that names none; by default what the model is made for."""


class EncoderSettings(Room):
    device: Device = "auto"
    """Device of the text encoder; `auto` takes a GPU where `num_gpus` gives the replica one, else the CPU."""
    dtype: Dtype = "float32"
    """Precision of the text encoder; part of the cache key."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Weights of the linear layers in fewer bits; part of the cache key."""
    compile: bool = False
    """Compile the layers with `torch.compile` at start, which takes longer then; no request ever waits for it."""
    shard: bool = False
    """Spread the layers over all GPUs that `num_gpus` gives a replica, for an encoder that is larger than one.
    Can't be combined with `compile`."""
    max_batch_size: int = Field(32, ge=1)
    """Most rows of one forward pass."""
    max_batch_tokens: int = Field(4096, ge=77)
    """Most tokens of one forward pass, padding included; a longer row goes alone."""
    torch_threads: int | None = Field(None, ge=1)
    """CPU threads of the text encoder, where it runs on a CPU; by default torch's own choice, which under Ray is one
    thread unless `num_cpus` is larger (Ray sets OMP_NUM_THREADS)."""
    redis: bool = True
    """Share embeddings through the cache Redis."""
    lease_s: float = Field(0.0, ge=0)
    """Seconds for which one replica may keep the others from encoding the same text; 0 lets them. Pays for encoders
    whose forward takes longer than a round trip to Redis and that have several replicas (T5)."""
    slow_s: float = Field(0.2, gt=0)
    """A request to the pool that takes longer is logged."""
    stall_s: float = Field(60.0, gt=0)
    """Seconds that one forward pass may take before the replica counts as hung and is replaced."""
    start_s: float = Field(120.0, gt=0)
    """Seconds that a request waits for a pool that is asleep, beyond those that it would wait for one that is awake."""
    min_replicas: int = Field(1, ge=0)
    """Fewest encoder replicas; 0 lets the pool sleep, once it was loaded at the start, and the next text wakes it."""
    max_replicas: int = Field(1, ge=1)
    """Most encoder replicas."""
    target_queue_tokens: int = Field(8192, ge=1)
    """Tokens that wait or are being encoded per replica at which the pool grows."""
    idle_s: float = Field(60.0, gt=0)
    """Seconds of a smaller load after which the pool shrinks."""
    num_cpus: float = Field(0.2, ge=0)
    """CPUs that one replica reserves in Ray."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs (fractions allowed) that one replica reserves in Ray."""
    gpu_class: str | None = None
    """One of `gpu_classes`: the replicas run on nodes with its label. By default on any that has what they reserve."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        if self.compile and self.shard:
            raise ValueError("compile and shard can't be combined")
        return self

    @property
    def place(self) -> Device:
        """The device that is asked for. Ray hides no GPU from a replica that reserves none, so this must."""
        return "cpu" if self.device == "auto" and not self.num_gpus else self.device


class GpuClassSettings(Room):
    memory_gb: float = Field(gt=0, le=1e6, allow_inf_nan=False)
    """Memory of one such GPU, in GB (10^9 bytes)."""
    label: str | None = None
    """Value of the node label `tandem.dev/gpu-class`; by default the class's name."""
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
    """What it computes in at full speed; `dtype: auto` takes the model's own among them, or else the first. Turing has
    no bfloat16."""

    @model_validator(mode="after")
    def _computes(self) -> Self:
        if not self.dtypes:
            raise ValueError("dtypes is empty")
        return self


class DiffusionSettings(Room):
    model: str | None = None
    """Name of the model that is drawn here; by default the first. `placements` say which model is drawn where."""
    gpu_class: str | None = None
    """One of `gpu_classes`: the replicas run on nodes with its label, and hold what its memory holds."""
    device: Device = "auto"
    """Device of the denoiser; `auto` takes cuda, then mps, then cpu."""
    dtype: Literal["auto", Dtype] = "auto"
    """Precision of denoiser and VAE; `auto` takes float32 on a CPU, on a GPU float16 for Stable Diffusion 1.x, 2.x and
    XL and bfloat16 for the others, as far as the card (its class's `dtypes`) has them."""
    max_batch_size: int = Field(8, ge=1)
    """Most images that step together in one forward pass; the profile taken at start may set fewer."""
    max_rows: int = Field(16, ge=1)
    """Most images in hand: beyond a full batch they take turns, so that a short job need not wait for long ones."""
    max_pixels: int | None = Field(None, ge=64)
    """Largest image (width x height) that is drawn here; by default what the GPU class's memory holds."""
    rung: Literal["auto", RungName] = "auto"
    """Where the memory ladder begins: the first of its rungs, from this one down, that holds the model's own size is
    taken. `auto` begins at the top, with everything on the card."""
    worst_rung: RungName = "sequential_offload"
    """The last rung of the memory ladder that may be taken, at the start and where memory runs out while images are
    drawn."""
    replicas: int = Field(1, ge=0)
    """Number of diffusion replicas, at the start where `min_replicas` and `max_replicas` let it change. With 0, and no
    `max_replicas`, this server only encodes text."""
    min_replicas: int | None = Field(None, ge=0)
    """Fewest replicas, by default `replicas`; 0 lets them all go while nothing is ordered, and the next order brings
    one back."""
    max_replicas: int | None = Field(None, ge=0)
    """Most replicas, by default `replicas`."""
    target_wait_s: float = Field(30.0, gt=0, allow_inf_nan=False)
    """Predicted seconds of work, queued and in hand, for each replica at which there are to be more."""
    idle_s: float = Field(300.0, gt=0, allow_inf_nan=False)
    """Seconds of less work after which there are to be fewer."""
    num_cpus: float = Field(0.5, ge=0)
    """CPUs that one replica reserves in Ray."""
    num_gpus: float = Field(0.0, ge=0, le=1)
    """Share of a GPU that one replica reserves in Ray, at most 1: a denoiser runs on one. A replica that reserves none
    must not have a `gpu_class`, unless its `device` is the CPU; `tandem up` shares out what is left open."""
    torch_threads: int | None = Field(None, ge=1)
    """CPU threads of the denoiser, where it runs on a CPU; by default all cores but one."""
    channels_last: bool | None = None
    """Keep convolutions' weights and activations channels-last; by default for U-Nets and VAEs, which have them."""
    compile: bool = False
    """Compile the denoiser with `torch.compile` at start, for batches padded to 1, 2, 4, 8, ... entries; the first step
    of a new size waits for it."""
    tiny_vae: str | None = None
    """Folder of a small VAE (TAESD, `AutoencoderTiny`) that requests may choose with `tiny_vae`."""
    step_cache: bool = True
    """Let requests choose `step_cache`, which reuses predictions between steps that hardly differ."""
    profile_s: float = Field(20.0, ge=0)
    """Seconds that a replica may take at its first start to find the batch that pays for each size, kept under
    `data_dir`; 0 measures nothing, and a step takes `max_batch_size` images."""
    stall_s: float | None = Field(None, gt=0)
    """Seconds without any step or decoding, although there is something to draw, after which the replica counts as hung
    and is replaced; by default 20 on a GPU, 120 on a CPU or with `compile`, whose first step of a new size compiles. In
    any case five times the slowest step that is known for what is in hand."""
    drain_s: float = Field(120.0, gt=0)
    """Seconds that a replica which is told to stop may take to finish the jobs that it holds."""

    @model_validator(mode="after")
    def _descends(self) -> Self:
        if worse(self.best_rung, than=Rung(self.worst_rung)):
            raise ValueError(f"rung {self.rung} is below worst_rung {self.worst_rung}")
        return self

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.least_replicas > self.replicas:
            raise ValueError(f"min_replicas {self.least_replicas} is more than replicas {self.replicas}")
        if self.replicas > self.most_replicas:
            raise ValueError(f"replicas {self.replicas} is more than max_replicas {self.most_replicas}")
        return self

    @property
    def least_replicas(self) -> int:
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most_replicas(self) -> int:
        """A placement of which there are none at most is left out."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def best_rung(self) -> Rung:
        """The first that is tried."""
        return Rung.RESIDENT if self.rung == "auto" else Rung(self.rung)

    @property
    def fixed_dtype(self) -> Dtype | None:
        """None where the card decides."""
        return None if self.dtype == "auto" else self.dtype


class CaptionSettings(Room):
    source: str = ""
    """Folder of the model that describes pictures (`POST /v1/captions`): any image-text-to-text model of transformers
    (BLIP, LLaVA, Pixtral, Llama 3.2 Vision) with safetensors. Without one, captions are not offered."""
    name: str | None = None
    """Name that requests use in `model`; by default the last part of the source."""
    prompt: str = ""
    """What the model is told of a picture by a request that tells it nothing. By default nothing, where the model
    captions pictures alone, and `Describe this image in one sentence.` where it chats."""
    max_new_tokens: int = Field(64, ge=1)
    """Most tokens of a caption, and those of a request that names none."""
    device: Device = "auto"
    """Device of the model; `auto` takes a GPU where `num_gpus` gives the replica one, else the CPU."""
    dtype: Literal["auto", Dtype] = "auto"
    """Precision of the model; `auto` takes float32 on a CPU, on a GPU bfloat16, or float16 where it has none."""
    max_batch_size: int = Field(8, ge=1)
    """Most pictures that are described at once."""
    batch_wait_s: float = Field(0.01, ge=0)
    """Seconds that a picture waits for others that may share its batch. While a batch is computed, the next one gathers
    by itself."""
    torch_threads: int | None = Field(None, ge=1)
    """CPU threads of the model, where it runs on a CPU; by default all cores but one."""
    stall_s: float = Field(120.0, gt=0)
    """Seconds that one batch may take before the replica counts as hung and is replaced, and a request is given up."""
    start_s: float = Field(300.0, gt=0)
    """Seconds that a request waits for a pool that is asleep, beyond those that it would wait for one that is awake."""
    min_replicas: int = Field(1, ge=0)
    """Fewest replicas; 0 lets the pool sleep, once it was loaded at the start, and the next picture wakes it."""
    max_replicas: int = Field(1, ge=1)
    """Most replicas; the pool grows where more than `max_batch_size` pictures wait for each."""
    idle_s: float = Field(300.0, gt=0)
    """Seconds of a smaller load after which the pool shrinks."""
    num_cpus: float = Field(0.5, ge=0)
    """CPUs that one replica reserves in Ray."""
    num_gpus: float = Field(0.0, ge=0, le=1)
    """Share of a GPU that one replica reserves in Ray, at most 1."""
    gpu_class: str | None = None
    """One of `gpu_classes`: the replicas run on nodes with its label. By default on any that has what they reserve."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self

    @property
    def place(self) -> Device:
        """As an encoder's."""
        return "cpu" if self.device == "auto" and not self.num_gpus else self.device

    @property
    def model(self) -> str:
        """Name of the model; empty where captions are not offered."""
        return self.name or Path(self.source).name if self.source else ""
