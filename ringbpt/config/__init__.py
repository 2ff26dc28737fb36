"""The flags, and the frozen Config that a command line becomes. Everybody imports from here; nothing imports jax."""

from ringbpt.config.checks import (
    BLOCK_POLICIES,
    CHOICES,
    DTYPES,
    check,
    check_load_checkpoint,
    check_mesh,
    complete,
    nearest_name,
    parse_mesh_dim,
)
from ringbpt.config.data_checks import bad_lines_allowed
from ringbpt.config.entry import Flag, check_folders, own_help, read_own_flags, split_flags
from ringbpt.config.fields import (
    FLAG_TYPES,
    PRESETS,
    AdamWConfig,
    Architecture,
    CheckpointerConfig,
    Config,
    DatasetConfig,
    Execution,
    FilesDatasetConfig,
    HuggingfaceDatasetConfig,
    JaxDistributedConfig,
    JsonDatasetConfig,
    LionConfig,
    LoggerConfig,
    MuonConfig,
    OptimizerConfig,
    PalmConfig,
    PythonDatasetConfig,
    TextProcessorConfig,
    TfdsDatasetConfig,
    TokenizerConfig,
    UserError,
    to_dict,
)
from ringbpt.config.parse import (
    ALIAS_TYPES,
    ENTRY_FLAGS,
    HELP,
    ROOT,
    default_config,
    format_config,
    help_text,
    load_recipe,
    parse,
    parse_args,
    read_literals,
    run_main,
)
