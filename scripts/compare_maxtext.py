"""docs/peers.md: one train step of Llama-2-7B by this house and by MaxText, both compiled for the same TPUs, not run.

    make peers ARGS="--only='v5p-16 32K'"

Both are compiled by the same jax for the same abstract devices, and one reader reads memory and transfers off both
programs. Each side of a row is a process of its own, and is kept in docs/peers.json as soon as it is known, so that a
night's run can be stopped and gone on with; the page and its picture are written from that file.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from ringbpt.config import Flag, UserError, nearest_name, printed_help, read_flags, run_main
from ringbpt.planning.beside import ROWS, SIDES, Step, compile_side, reason, sides
from ringbpt.planning.peers_page import cells, draw, page
from ringbpt.planning.program import read_program, shard_bytes
from ringbpt.planning.topologies import Topology

FLAGS = {
    "only": Flag(str, "", "rows whose name contains this text, as 'v5p-16 32K'"),
    "minutes": Flag(float, 60.0, "a side of a row that compiles for longer is left for another run", above=0),
    "page": Flag(bool, False, "compile nothing: write the page again"),
    "side": Flag(str, "", "of one row alone, ours, theirs or plain: print what is read off it, as JSON"),
}
DOCS = Path(__file__).parents[1] / "docs"


def theirs(machine: Topology, flags: list[str]) -> Step:
    """MaxText's step, made as its own train_compile does, for our devices."""
    os.environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"  # as train_compile says
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    import maxtext
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import maxtext_utils, sharding

    config = pyconfig.initialize(["", f"{Path(maxtext.__file__).parent}/configs/base.yml", *flags])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config, machine.devices), config.mesh_axes)
    (state, batch), _, of_state, _, model = train_compile.get_shaped_inputs(mesh, config)
    of_params, of_state = sharding.maybe_update_params_sharding_with_opt(config, of_state)
    of_batch = sharding.get_input_data_sharding(config, mesh)
    step, in_shardings, out_shardings, static, donated = maxtext_utils.get_functional_train_with_signature(
        train.train_step, of_batch, of_state, model, config, of_params
    )
    placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    held = {"state": (state, of_state), "batch": (batch, dict.fromkeys(batch, of_batch))}
    arguments = {name: shard_bytes(jax.tree.map(placed, *trees)) for name, trees in held.items()}
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        jitted = jax.jit(
            step, in_shardings=in_shardings, out_shardings=out_shardings, static_argnums=static, donate_argnums=donated
        )
        lowered = jitted.lower(state, batch)
    program = read_program(lambda options: lowered.compile(compiler_options=options), arguments, "jit_train_step")
    return program, mesh.devices.shape, tuple(mesh.axis_names)


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    own, file = read_flags(argv, FLAGS), DOCS / "peers.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    names = [name for name in ROWS if own["only"] in name]
    if not names:
        raise UserError(
            f"--only={own['only']!r} is in no row's name; did you mean --only={nearest_name(own['only'], ROWS)!r}?"
        )
    if own["side"]:
        if own["side"] not in SIDES or own["only"] not in ROWS:
            raise UserError(f"--side={own['side']}: {', '.join(SIDES)}, of one row: --side=ours --only={names[0]!r}")
        jax.config.update("jax_platforms", "cpu")  # whatever is here, nothing runs on it
        print(json.dumps(compile_side(own["only"], own["side"], known, theirs)))
        return 0
    try:
        version("maxtext")
    except PackageNotFoundError:
        if not own["page"]:
            raise UserError("maxtext is not installed here: make peers builds its environment and runs this") from None
    todo = [(name, side) for name in names for side in sides(name) if side not in known.get(name, {})]
    for name, side in [] if own["page"] else todo:
        command = [sys.executable, __file__, f"--side={side}", f"--only={name}"]
        try:
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, timeout=60 * own["minutes"])
            known.setdefault(name, {})[side] = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
            print(f"{name}, {side}: left out: {reason(error)}", flush=True)
            continue
        print(f"{name}, {side}: {' | '.join(cells(known[name][side]))}", flush=True)
        file.write_text(json.dumps(known, indent=1) + "\n")
    (DOCS / "peers.md").write_text(page(known))
    draw(known, DOCS / "peers.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
