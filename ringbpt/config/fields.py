"""The flags of a run: one tree of frozen dataclasses, each field of which is one flag, declared once.

A field says the flag's type and default, and by `flag(...)` its help, its choices and its bounds; RUN_FLAGS is all of
them by their dotted names. What several flags must be together is judged in `ringbpt.config.checks`.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from ringbpt.config.fields_of_data import LARGEST_POSITION, DatasetConfig, TokenizerConfig
from ringbpt.config.presets import PRESETS
from ringbpt.config.values import Flag, flag
from ringbpt.dims import AXES, MeshShape

# What several flags may be.
# Weights in blocks of 4 or 8 bits, of BLOCK numbers along the hidden size; scales doubly quantised have heads, or
# DOUBLE_BLOCK of the intermediate size, in common.
QUANTISED, BLOCK, DOUBLE_BLOCK = ("nf4", "int8"), 64, 64
DTYPES = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
REMAT_POLICIES = (
    "",
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
    "save_attention",
)


LARGEST_VOCABULARY = 1 << 24  # more tokens than any tokenizer has, so that a wrong file is told
CHECKPOINT_PREFIXES = ("params", "trainstate", "trainstate_params", "flax_params", "huggingface", "gguf")
OBJECTIVE_NAMES = (
    "pretrain", "sft", "dpo", "ipo", "cdpo", "robust", "hinge", "exo", "nca", "bco", "sppo", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm", "simpo", "orpo", "kto", "apo_zero_unpaired",
    "reward",
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline",
    "distill", "ppo",
)  # fmt: skip
POLICIES = OBJECTIVE_NAMES[OBJECTIVE_NAMES.index("grpo") :]  # those that learn from rollouts
SCORING = ("reward",)  # those whose model has no vocabulary to predict, and says one number of each token
CRITICS = ("ppo",)  # those whose model says, beside the next token, what is to be expected from there on
SAVE_MINUTES = 10.0  # a run that says nothing of checkpoints loses no more


@dataclass(frozen=True)
class ScheduledConfig:
    """What every optimizer has whose rate rises, falls, and stays."""

    init_lr: float = flag(0.0, "the rate that the warmup starts from", at_least=0)
    end_lr: float | None = flag(None, "the rate that the decay ends at; None: a tenth of lr", at_least=0)
    lr: float | None = flag(None, "peak", at_least=0, usual=(1e-4, 5e-6))
    lr_warmup_steps: int | None = flag(
        None, "None: 2000, a tenth of total_steps at most; on loaded weights 3 % of total_steps", at_least=0
    )
    lr_decay_steps: int | None = flag(None, "the step at which the decay ends; None: total_steps", at_least=1)
    clip_gradient: float = flag(1.0, "the largest global norm; 0: no clipping", at_least=0)
    weight_decay: float = flag(0.0, at_least=0)


@dataclass(frozen=True)
class AdamWConfig(ScheduledConfig):
    lr: float | None = flag(
        None, "peak; also end_lr, lr_warmup_steps, ...", at_least=0, usual=(3e-4, 2e-5), shown="training"
    )
    b1: float = flag(0.9, at_least=0, below=1)
    b2: float = flag(0.95, at_least=0, below=1)
    weight_decay: float = flag(1e-4, at_least=0)
    bf16_momentum: bool = False
    multiply_by_parameter_scale: bool = flag(False, "steps in units of each weight's RMS")


@dataclass(frozen=True)
class LionConfig(ScheduledConfig):
    b1: float = flag(0.9, at_least=0, below=1)
    b2: float = flag(0.99, at_least=0, below=1)
    weight_decay: float = flag(1e-3, at_least=0)
    bf16_momentum: bool = False


@dataclass(frozen=True)
class MuonConfig(ScheduledConfig):
    # Above 0: adam's rate is a share of muon's.
    lr: float | None = flag(
        None, "of the matrices; vectors, embedding and unembedding take adam_lr", above=0, usual=(0.02, 1e-3)
    )
    adam_lr: float | None = flag(None, at_least=0, usual=(3e-4, 2e-5))
    beta: float = flag(0.95, at_least=0, below=1)


@dataclass(frozen=True)
class PalmConfig:
    """Adafactor as PaLM had it; its rate is 1/sqrt(step) after the warmup, and step 0 has none."""

    lr: float | None = flag(None, "peak", at_least=0, usual=(0.01, 1e-3))
    lr_warmup_steps: int = flag(10000, at_least=1)
    b1: float = flag(0.9, at_least=0, below=1)
    b2: float = flag(0.99, at_least=0, below=1)
    clip_gradient: float = flag(1.0, "the largest global norm; 0: no clipping", at_least=0)
    weight_decay: float = flag(1e-4, at_least=0)
    bf16_momentum: bool = False


@dataclass(frozen=True)
class OptimizerConfig:
    type: str = flag("adamw", choices=("adamw", "palm", "lion", "muon"), shown="training")
    schedule: str = flag(
        "warmup_cosine", "palm has its own", choices=("warmup_cosine", "warmup_linear", "wsd"), shown="training"
    )
    allow_rising_lr: bool = flag(False, "end_lr may be above lr")
    wsd_decay_fraction: float = flag(0.1, "the last share of lr_decay_steps, in which wsd decays", above=0, at_most=1)
    offload_state: bool = flag(False, "the optimizer's state in the host's memory, updated a layer at a time")
    offload_params: bool = flag(False, "weights and gradients there too, a layer's at a time on the device")
    accumulate_gradient_steps: int = flag(1, "parts of a batch, one after the other", at_least=1, shown="training")
    rows_at_a_time: int | None = flag(
        None, "of a device; None: the batch in accumulate_gradient_steps parts", at_least=1
    )
    adamw_optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    palm_optimizer: PalmConfig = field(default_factory=PalmConfig)
    lion_optimizer: LionConfig = field(default_factory=LionConfig)
    muon_optimizer: MuonConfig = field(default_factory=MuonConfig)

    @property
    def group(self) -> str:
        """The name of the group that `type` reads."""
        return f"{self.type}_optimizer"

    @property
    def chosen(self) -> ScheduledConfig | PalmConfig:
        """The group that `type` names."""
        return getattr(self, self.group)

    @property
    def is_offloaded(self) -> bool:
        """Whether anything that the update reads is in the host's memory."""
        return self.offload_params or self.offload_state

    @property
    def is_layerwise(self) -> bool:
        """Whether the update of one layer of a stacked weight depends on that layer alone: not where steps are in units
        of the whole weight's RMS.
        """
        scaled = self.type == "adamw" and self.adamw_optimizer.multiply_by_parameter_scale
        return self.type != "palm" and not scaled


@dataclass(frozen=True)
class CheckpointerConfig:
    float_dtype: str = flag("bf16", "of weights saved without optimizer state", choices=tuple(DTYPES))
    save_optimizer_state: bool = flag(False, "the whole train state, not only weights", shown="the run")
    keep: int = flag(2, "of the newest that are no milestones", at_least=1, shown="the run")
    keep_period: int = flag(0, "a checkpoint whose step it divides is kept for ever; 0: none for that", at_least=0)


@dataclass(frozen=True)
class GuardConfig:
    skip: bool = flag(True, "an update whose loss or gradients are no numbers changes nothing")
    stop_after: int = flag(10, "so many skipped in a row end the run, exit code 3", at_least=1)
    spike: float = flag(0.0, "skip a loss so many standard deviations above the last good ones'; 0: none", at_least=0)
    window: int = flag(100, "good steps that a spike is measured by", at_least=10)
    replicas: int = flag(100, "steps between two comparisons of the copies of each weight; 0: none", at_least=0)


@dataclass(frozen=True)
class PreferenceConfig:
    """What learning from preferences asks, with --objective=dpo and its family, simpo, orpo and kto."""

    beta: float = flag(0.1, "how far from the reference; of simpo and orpo the weight of the odds", above=0)
    label_smoothing: float | None = flag(
        None, "the share of labels taken to be wrong; None: 0.1 for cdpo, robust and exo", at_least=0, below=0.5
    )
    nll_coefficient: float = flag(0.0, "of the chosen answers' cross-entropy, added to the loss", at_least=0)
    margin_coefficient: float | None = flag(
        None, "dpo, reward: times a pair's `margin`, to be kept between the rewards; None: 0, of reward 1", at_least=0
    )
    center_coefficient: float = flag(0.0, "reward: of (chosen + rejected)^2, so that scores stay around 0", at_least=0)
    ipo_sum: bool = flag(False, "ipo of summed log-probabilities, not of means over tokens")
    simpo_gamma: float = flag(0.5, "simpo: the margin to keep", at_least=0)
    discopop_tau: float = flag(0.05, "discopop: how sharply its two losses change over", above=0)
    desirable_weight: float = flag(1.0, "kto: of each desirable answer", at_least=0)
    undesirable_weight: float = flag(1.0, "kto: of each undesirable one", at_least=0)

    @property
    def smoothing(self) -> float:
        """label_smoothing of the losses that are nothing without one."""
        return 0.1 if self.label_smoothing is None else self.label_smoothing


@dataclass(frozen=True)
class PolicyConfig:
    """What learning from rollouts asks, with --objective=grpo and its family; None, "": what the objective's own is."""

    clip_low: float | None = flag(None, "how far below 1 a ratio to the old policy still learns", at_least=0)
    clip_high: float | None = flag(None, "how far above 1", at_least=0)
    dual_clip: float = flag(0.0, "the largest ratio that counts of a bad token; 0: any", at_least=0)
    average: str = flag("", "over what the loss is a mean", choices=("", "token", "answer", "constant"))
    kl_coefficient: float = flag(0.0, "of the distance from the reference; 0: there is none", at_least=0)
    kl: str = flag("k3", "how that is estimated at a token", choices=("k1", "k2", "k3"))
    kl_in_reward: bool = flag(False, "it is taken from each token's reward (reinforce_pp), and no part of the loss")
    entropy_coefficient: float = flag(0.0, "of the mean entropy, as a bonus", at_least=0)
    correction: str = flag(
        "",
        "what is done where the sampler was not quite the policy: token's or answer's ratio, cut or left out",
        choices=("", "token_truncate", "token_mask", "answer_truncate", "answer_mask"),
    )
    correction_cap: float = flag(3.0, "the largest ratio of that", above=0)
    correction_floor: float = flag(0.0, "the smallest", at_least=0)
    discount: float = flag(1.0, "of what comes a token later", above=0, at_most=1)
    decay: float = flag(0.95, "ppo: of what is known of later tokens (lambda)", at_least=0, at_most=1)
    value_coefficient: float = flag(0.1, "ppo: of the values' squared error", at_least=0)
    value_clip: float = flag(0.2, "ppo: how far a value may go from the old one; 0: any", at_least=0)


@dataclass(frozen=True)
class RolloutConfig:
    """Where samples come from, and what they are worth, with --objective=grpo and its family."""

    prompts: str = flag("", 'a .jsonl file of {"prompt"} or {"messages"}, and what else the reward looks at')
    reward: str = flag(
        "", "FILE.py:NAME, PREFIX::PATH of a reward model, or http://HOST/PATH; several with commas", shown="training"
    )
    reward_weights: str = flag("", "of several, as 1,0.5; empty: all 1")
    reward_normalise: bool = flag(False, "each of several over the rollout first, and then the sum of them")
    reward_timeout: float = flag(60.0, "seconds that a reward, or a step of an environment, may take", above=0)
    reward_failures: float = flag(0.5, "the share of a rollout's rewards that may fail", at_least=0, at_most=1)
    prompts_per_step: int = flag(8, "of each rollout", at_least=1, at_most=1 << 20)
    samples_per_prompt: int = flag(8, "answers to each", at_least=1, at_most=1 << 12)
    max_new_tokens: int = flag(256, "of an answer, its end among them", at_least=1, at_most=LARGEST_POSITION)
    temperature: float = flag(1.0, "of sampling, and of what the policy is learnt as", above=0, at_most=100)
    top_p: float = flag(1.0, "of sampling: 1 is all it may be, for the policy is learnt on all", above=0, at_most=1)
    top_k: int = flag(0, "of sampling: 0 is all it may be", at_least=0)
    updates: int = flag(1, "optimizer steps that a rollout is learnt in", at_least=1, at_most=1 << 10)
    servers: str = flag("", "ringbpt.serve's, vLLM's or SGLang's http://HOST:PORT, with commas; empty: own devices")
    server_timeout: float = flag(
        600.0, "seconds without a server, or for an answer, after which a run ends", above=0, at_most=1e7
    )
    max_staleness: int = flag(0, "rollouts that servers sample while earlier ones are learnt", at_least=0, at_most=64)
    environment: str = flag("", "FILE.py:NAME, which answers the policy's turns and says what they are worth")
    max_turns: int = flag(4, "of the policy in an environment, each of max_new_tokens", at_least=1, at_most=1 << 10)

    @property
    def most_drawn(self) -> int:
        """Tokens of an answer that are sampled, at most, in all its turns."""
        return self.max_new_tokens * (self.max_turns if self.environment else 1)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank pairs, which are trained, beside weights that stay as they are; the words are PEFT's."""

    rank: int = flag(0, "of each pair; 0: all weights are trained", at_least=0, at_most=1 << 14, shown="training")
    alpha: float | None = flag(None, "a pair counts alpha / rank; None: as much as the rank", above=0)
    target_modules: str = flag("all-linear", "which: q_proj,v_proj and so on, or a pattern of whole names")
    rslora: bool = flag(False, "alpha / sqrt(rank) instead")
    rank_pattern: str = flag("", '"dict(q_proj=8)": other ranks, by names or patterns of them')
    alpha_pattern: str = flag("", "the same of alpha")
    dropout: float = flag(0.0, "of a pair's input: there is none", at_least=0, below=1)
    base_dtype: str = flag(
        "",
        "in which the weights that stay are kept; empty: as --dtype; nf4, int8: a layer's matrices, the rest so",
        choices=("", *DTYPES, *QUANTISED),
    )
    double_quantization: bool = flag(False, "of nf4 or int8: blocks' scales in 8 bits too")


@dataclass(frozen=True)
class Architecture:
    """What a model is, and a checkpoint of it: sizes, positions, norms, experts, and where its stacks have L.

    Its flags are `llama.*`, as are those of Execution.
    """

    vocab_size: int = flag(32000, at_least=1, at_most=LARGEST_VOCABULARY)
    hidden_size: int = flag(4096, at_least=1, at_most=1 << 20)
    intermediate_size: int = flag(11008, at_least=1, at_most=1 << 22)
    num_hidden_layers: int = flag(32, at_least=1, at_most=4096)
    num_attention_heads: int = flag(32, at_least=1, at_most=1 << 16)
    num_key_value_heads: int | None = flag(None, "None: as many as num_attention_heads", at_least=1)
    head_dim: int | None = flag(None, "None: hidden_size / num_attention_heads", at_least=2, at_most=1 << 16)
    max_sequence_length: int = flag(
        2048, "the longest sequence the model takes", at_least=1, at_most=LARGEST_POSITION, shown="model"
    )
    rms_norm_eps: float = flag(1e-6, above=0)
    initializer_range: float = flag(0.02, "standard deviation of the first weights", at_least=0)
    use_cache: bool = True
    bos_token_id: int | None = flag(0, "written into an exported config.json; texts begin as the tokenizer says")
    eos_token_id: int | None = flag(1, "written into an exported config.json; texts end as the tokenizer says")
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    tie_word_embeddings: bool = False
    head: str = flag(
        "unembed",
        "what reads the last hidden states: the vocabulary, one number a token, or both",
        choices=("unembed", "score", "both"),
    )
    theta: float = flag(10000.0, "base of the rotary positions", above=0)
    rope_scaling_type: str = flag("", "how rotary positions are stretched", choices=("", "linear", "llama3", "yarn"))
    rope_scaling_factor: float = flag(1.0, above=0)
    rope_scaling_low_freq_factor: float = flag(1.0, "of llama3", above=0)
    rope_scaling_high_freq_factor: float = flag(4.0, "of llama3", above=0)
    rope_scaling_original_length: int = flag(8192, at_least=1)
    rope_scaling_beta_fast: float = flag(32.0, "yarn: a pair with more turns stays as it is", above=0)
    rope_scaling_beta_slow: float = flag(1.0, "yarn: one with fewer is divided by the factor", above=0)
    rope_scaling_truncate: bool = flag(True, "yarn: those bounds in whole pairs")
    rope_scaling_attention_factor: float | None = flag(None, "yarn: of cos and sin; None: 0.1 ln(factor) + 1")
    sliding_window: int | None = flag(None, "how many tokens a token sees, with itself; None: all", at_least=1)
    qkv_bias: bool = False
    qk_norm: bool = flag(False, "RMS norm of each head's queries and keys, before they are rotated")
    num_experts: int = flag(0, "0: one feedforward; else so many, of intermediate_size each", at_least=0, at_most=4096)
    num_experts_per_tok: int = flag(2, at_least=1)
    router_aux_loss_coef: float = flag(0.0, "of the load balancing loss, where there are experts", at_least=0)
    param_scan_axis: int = flag(0, "the axis over which layers are stacked", at_least=0, at_most=1)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


@dataclass(frozen=True)
class Execution:
    """How a model is computed, which changes no number: one architecture trains, generates and is planned in several.

    Its flags are `llama.*`, as are those of Architecture.
    """

    attention_type: str = flag(
        "auto",
        "auto: ring_blockwise where sp > 1, else blockwise",
        choices=("auto", "standard", "blockwise", "ring_standard", "ring_blockwise"),
        shown="model",
    )
    attention_kernel: str = flag(
        "auto",
        "auto takes the fastest",
        choices=(
            "auto",
            "reference",
            "blockwise",
            "pallas_tpu",
            "pallas_tpu_interpreted",
            "pallas_triton",
            "pallas_triton_interpreted",
            "pallas_hopper",
            "pallas_hopper_interpreted",
            "cudnn",
        ),
        shown="model",
    )
    sequence_layout: str = flag(
        "auto",
        "deals tokens out over sp; balanced: by the documents' lengths",
        choices=("auto", "contiguous", "zigzag", "striped", "balanced"),
        shown="model",
    )
    sequence_parallel: str = flag(
        "ring",
        "how shares meet over sp",
        choices=("auto", "ring", "all_gather", "ulysses", "ulysses_ring"),
        shown="model",
    )
    heads_k_stride: int | None = flag(None, "all_gather: kv heads gathered at a time; None: all", at_least=1)
    ulysses_degree: int | None = flag(None, "ulysses_ring: devices that trade heads, of sp", at_least=1)
    ring_bidirectional: bool = flag(False, "half of the keys travel each way round")
    ring_skip_hops: bool = flag(False, "keys travel only as far as somebody sees any (short documents, contiguous)")
    scan_attention: bool = False
    scan_query_chunk_size: int | None = flag(
        None, "the most queries of a block; also scan_key_chunk_size", at_least=1, shown="model"
    )
    scan_key_chunk_size: int | None = flag(None, "the most keys of a block; None: by the kernel", at_least=1)
    scan_mlp: bool = flag(False, "feedforward in chunks of llama.scan_mlp_chunk_size", shown="model")
    scan_mlp_chunk_size: int = flag(1024, "tokens of the local sequence", at_least=1)
    loss_chunk_size: int = flag(1024, "tokens of the local sequence whose logits are held together", at_least=1)
    kv_heads_at_a_time: int | None = flag(None, "of a device; a whole layer in blocks", at_least=1)
    scan_layers: bool = flag(True, "one layer's program for all layers")
    reduce_dtype: str = flag(
        "fp32",
        "in which gradients of weights, keys and values travel to be summed; bf16: half the bytes (docs/attention.md)",
        choices=("fp32", "bf16"),
    )
    gathered_weights: str = flag(
        "again",
        "for the backward: gather them again, or keep them since the forward; auto: where memory allows",
        choices=("again", "keep", "auto"),
    )
    residual_over_tp: bool = flag(False, "between layers, tokens split over tp too: what remat saves shrinks by tp")
    remat_block: str = flag(
        "",
        "what to keep of a layer for the backward pass",
        choices=(*REMAT_POLICIES, "offload_inputs"),  # only a whole layer's input can wait in the host's memory
        shown="model",
    )
    remat_attention: str = flag("", "the same of attention alone", choices=REMAT_POLICIES)
    remat_mlp: str = flag("", "the same of the feedforward alone", choices=REMAT_POLICIES)
    mesh_dim: str | None = None


@dataclass(frozen=True)
class LoggerConfig:
    project_id: str = flag("ringbpt", "the project at Weights & Biases")
    experiment_id: str = flag("", "the run's folder; empty: <time>-<name>", shown="the run")
    experiment_note: str = ""
    output_dir: str = flag("runs", "where the run's folder is made", shown="the run")
    online: bool = flag(False, "also to Weights & Biases", shown="the run")
    entity: str = flag("", "who the project at Weights & Biases belongs to")
    prefix: str = flag("", "before project_id in the name of the project")


@dataclass(frozen=True)
class JaxDistributedConfig:
    initialize_jax_distributed: bool = flag(False, "one process of several")
    coordinator_address: str | None = flag(None, "host:port of process 0; None: found by jax, as the next three")
    num_processes: int | None = flag(None, at_least=1)
    process_id: int | None = flag(None, at_least=0)
    local_device_ids: str | None = None
    coordinator_bind_address: str | None = flag(None, "host:port where process 0 listens; None: coordinator_address")
    initialization_timeout: int = flag(300, "seconds until all processes must have come", at_least=1)
    heartbeat_timeout: int = flag(100, "seconds without a word after which a process is lost", at_least=2)
    shutdown_timeout: int = flag(300, "seconds that a process which is done waits for the others", at_least=1)
    step_timeout: int = flag(3600, "seconds a step may take; longer: stacks.txt, exit code 5; 0: any", at_least=0)


@dataclass(frozen=True)
class Config:
    seed: int = flag(42, "of the weights and of the data's order", at_least=0, at_most=2**32 - 1, shown="training")
    mesh_dim: str = flag(
        "1,-1,1,1", "dp,fsdp,tp,sp, or 'dp:1,sp:-1'; -1: the rest; ! first: plain order", shown="devices"
    )
    mesh_slices: str = flag("dp", "of TPUs in several slices, the axis that stretches over them", choices=AXES)
    dtype: str = flag("bf16", "of the computation", choices=tuple(DTYPES), shown="devices")
    objective: str = flag("sft", "what is learnt", choices=OBJECTIVE_NAMES, shown="training")
    loss_average: str = flag("token", "of sft, over tokens, or over rows of each one's mean", choices=("token", "row"))
    reference: str = flag(
        "columns",
        "what the reference model says is computed once, before, or in each step beside the policy",
        choices=("columns", "step"),
    )
    reference_checkpoint: str = flag(
        "",
        "PREFIX::PATH, as load_checkpoint has it; empty: the weights that the run starts from",
        prefixes=CHECKPOINT_PREFIXES,
    )
    total_steps: int = flag(10000, "optimizer steps", at_least=1, at_most=LARGEST_POSITION, shown="training")
    load_llama_config: str = flag("", f"sizes of the model ({', '.join(PRESETS)})", shown="start from")
    update_llama_config: str = flag("", '"dict(scan_mlp=True,...)": any of the llama flags at once', shown="start from")
    load_checkpoint: str = flag(
        "",
        "PREFIX::PATH, as params::runs/<run>, gguf::<file> or huggingface::<folder or org/name>",
        prefixes=CHECKPOINT_PREFIXES,
        shown="start from",
    )
    load_dataset_state: str = flag("", "go on in the data from here: runs/<run>/checkpoints/<step>")
    log_freq: int = flag(50, "steps between two lines of metrics", at_least=1, shown="the run")
    save_model_freq: int | None = flag(
        None, "steps between two checkpoints; None: by time; 0: only at the end", at_least=0, shown="the run"
    )
    save_minutes: float | None = flag(
        None,
        f"between two checkpoints; None: {SAVE_MINUTES:g}, or with save_model_freq 0: none by time",
        at_least=0,
        shown="the run",
    )
    save_milestone_freq: int = flag(0, "between two that are kept; 0: none", at_least=0, shown="the run")
    save_final: bool = flag(True, "a checkpoint at the end, and at Ctrl-C")
    eval_steps: int = flag(0, "steps between two evaluations; 0: never", at_least=0, shown="the run")
    eval_batches: int = flag(8, "of each evaluation", at_least=1)
    eval_by_position: bool = flag(False, "with each evaluation, perplexity by position: perplexity.png")
    eval_passkey: str = flag("", "lengths, as '512,1024': with each evaluation, keys found at them: passkey.png")
    profile: str = flag("", "first,count of steps whose xprof trace goes to the run's folder, as 10,3", shown="the run")
    log_all_worker: bool = flag(False, "every process logs, not only the first")
    autoresume: bool = flag(False, "go on from the run's own latest checkpoint, if there is one", shown="start from")
    num_cpu_devices: int = flag(0, "virtual devices; 0: as jax finds them", at_least=0, at_most=4096, shown="devices")
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train_dataset: DatasetConfig = field(default_factory=DatasetConfig)
    eval_dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpointer: CheckpointerConfig = field(default_factory=CheckpointerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    architecture: Architecture = field(default_factory=Architecture, metadata={"group": "llama"})
    execution: Execution = field(default_factory=Execution, metadata={"group": "llama"})
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    jax_distributed: JaxDistributedConfig = field(default_factory=JaxDistributedConfig)
    mesh_shape: MeshShape = field(default_factory=MeshShape)  # mesh_dim resolved by parse(); not a flag


def group_name(item: Field) -> str:
    """What a field of the tree is called on the command line: architecture and execution share the group `llama`."""
    return item.metadata.get("group", item.name)


def _leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Field, Any]]:
    """Yields every flag's dotted name, its field and its value, in the order of the fields; `mesh_shape` is none."""
    for item in fields(group):
        if is_dataclass(item.type):
            yield from _leaves(getattr(group, item.name), f"{prefix}{group_name(item)}.")
        elif item.name != "mesh_shape":
            yield prefix + item.name, item, getattr(group, item.name)


# Every flag of a run, by its dotted name.
RUN_FLAGS: dict[str, Flag] = {
    name: Flag(item.type, item.default, **item.metadata) for name, item, _ in _leaves(Config())
}


def choices(name: str) -> tuple[str, ...]:
    """The names that the flag may have as its value, or before the `::` of it; () where it may be anything."""
    return RUN_FLAGS[name].choices or RUN_FLAGS[name].prefixes


def flag_values(config: Config) -> dict[str, Any]:
    """Every flag's dotted name and its value in `config`."""
    return {name: value for name, _, value in _leaves(config)}
