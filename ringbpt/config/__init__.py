"""The flags, and the frozen Config that a command line becomes. Everybody imports from here; nothing imports jax."""

from ringbpt.config.aliases import ALIASES, WITHOUT_EFFECT, without_effect
from ringbpt.config.checks import bad_lines_allowed, check, check_mesh, complete
from ringbpt.config.entry import (
    ENTRY_FLAGS,
    JSON,
    SECTIONS,
    STDOUT,
    check_folders,
    complain,
    help_text,
    json_to,
    printed_help,
    read_flags,
    run_main,
    say,
    scan,
    split_flags,
)
from ringbpt.config.fields import (
    CHECKPOINT_PREFIXES,
    DTYPES,
    POLICIES,
    PRESETS,
    RUN_FLAGS,
    AdamWConfig,
    Architecture,
    CheckpointerConfig,
    Config,
    Execution,
    GuardConfig,
    JaxDistributedConfig,
    LionConfig,
    LoggerConfig,
    LoraConfig,
    MuonConfig,
    OptimizerConfig,
    PalmConfig,
    PolicyConfig,
    PreferenceConfig,
    RolloutConfig,
    ScheduledConfig,
    choices,
    flag_values,
)
from ringbpt.config.fields_of_data import (
    DatasetConfig,
    FilesDatasetConfig,
    HuggingfaceDatasetConfig,
    JsonDatasetConfig,
    PythonDatasetConfig,
    TextProcessorConfig,
    TfdsDatasetConfig,
    TokenizerConfig,
)
from ringbpt.config.foreign import user_path
from ringbpt.config.hub import model_folder, stop_asking_where_none_answers
from ringbpt.config.parse import (
    DEFAULT_RECIPE,
    HOME,
    ROOT,
    default_config,
    format_config,
    load_recipe,
    parse,
    parse_args,
    to_dict,
)
from ringbpt.config.places import check_output, check_writable
from ringbpt.config.rates import complete_rates, describe_rates
from ringbpt.config.shown import for_terminal, json_line, one_line, printable
from ringbpt.config.values import (
    Flag,
    UserError,
    check_value,
    nearest_name,
    parse_mesh_dim,
    parse_profile,
    read_literals,
)
