"""`python -m ringbpt.columns <flags of ringbpt.train>`: what the reference model says of each token, before training.

The pass that a run with --objective=dpo (and its family, and kto) makes at its start, by itself: log-probabilities of
the data sets' tokens, kept in the cache. A killed pass goes on; the run that follows finds all of it, on any mesh.
"""

import sys

from ringbpt.config import UserError, parse, parse_args, printed_help, run_main


def main(argv: list[str]) -> int:
    if printed_help(argv, "columns", __doc__, {}):
        return 0
    tree = parse_args(argv)
    from ringbpt.mesh import mesh_of, start_jax

    config = parse(tree, start_jax(tree))
    from ringbpt.data.text.tokenizers import make_tokenizer
    from ringbpt.model.llama import Model
    from ringbpt.objectives import objective_of
    from ringbpt.training.loop import loaders_of
    from ringbpt.training.reference import Reference

    if not objective_of(config).reference:
        raise UserError(f"--objective={config.objective} is compared with no reference model: --objective=dpo is")
    loaders = loaders_of(config, make_tokenizer(config.tokenizer))
    model = Model.of(config, mesh_of(config))
    model.check_kernel(config.train_dataset.seq_length, any(loader.shares for loader in loaders.values()))
    Reference(config, model).column_of(loaders)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
