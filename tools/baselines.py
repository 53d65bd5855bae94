"""Roll out what a model is compared with: a random policy, the mean demonstration replayed blindly, the
scripted expert.

Run: python tools/baselines.py tabletop_object --demos out/demos/tabletop_object --episodes 50 --out results
Writes OUT/SUITE_{random,blind,expert}/record.json, the same schema as `worldvla eval`.
"""

import argparse
from pathlib import Path

from worldvla.eval.actors import Actor, BlindActor, ExpertActor, RandomActor
from worldvla.eval.rollout import run
from worldvla.sim.env import suite

POLICIES = ("random", "blind", "expert")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["random", "blind"])
    parser.add_argument("--demos", type=Path, help="HDF5 files of the suite, for the blind replay")
    parser.add_argument("--episodes", type=int, default=10, help="of each task")
    parser.add_argument("--first", type=int, default=0, help="initial state of the first episode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/baselines"))
    args = parser.parse_args()
    suite(args.suite)
    if "blind" in args.policies and args.demos is None:
        parser.error("the blind replay needs --demos, a directory that `worldvla collect` wrote")
    errors = 0
    for name in args.policies:
        actor: Actor = {
            "random": lambda: RandomActor(args.seed),
            "blind": lambda: BlindActor.from_demos(args.demos),
            "expert": ExpertActor,
        }[name]()
        out = args.out / f"{args.suite}_{name}"
        options = {"first": args.first, "seed": args.seed, "workers": args.workers}
        record = run(actor, args.suite, args.episodes, out_dir=out, videos=0, page=False, **options)
        low, high = record["wilson_95"]
        counts = f"{record['successes']}/{record['episodes']} (95% {low:.2f} to {high:.2f})"
        print(f"{args.suite}, {actor.name}: {counts}, errors {record['errors']}   {out}/record.json")
        errors += record["errors"]
    return 3 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
