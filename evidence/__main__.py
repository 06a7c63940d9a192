"""`python -m evidence`: run what is not there yet, then write docs/evidence.md from it.

python -m evidence [--full] [--jobs N]      # everything, N at a time, then the page
python -m evidence one 1 verbs 0.0002       # one job by itself, as the run starts them
python -m evidence page                     # the page alone, from what is there
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from evidence import ablations, merging, one, policies, soups, vision
from evidence.encoder import base_folder
from evidence.finetunes import trained
from evidence.page import publish, write_page
from evidence.setup import FULL, QUICK, ROOT, Setup, check_setup, result_path, save_setup
from evidence.texts import pools

Job = tuple[str, ...]


def phases(setup: Setup, seed: str) -> Iterator[list[Job]]:
    """What is run of a seed, in phases: jobs of one phase need those before it, and none of each other."""
    tasks = setup.in_turn(int(seed))
    first, *others = vision.DOMAINS if setup.full else vision.DOMAINS[1:2]
    # what the others start from: the fine-tunes, and the digits' encoder
    yield [("digits", seed, first), *(("train", seed, task, f"{setup.rate:g}") for task in setup.tasks)]
    jobs: list[Job] = []  # what takes longest first, so that no process waits for another
    if setup.full:
        jobs += [("soups", seed, tasks[0])]
    if setup.strong is not None:
        jobs += [("one", seed, task, f"{setup.strong:g}") for task in tasks]
    jobs += [("one", seed, task, f"{setup.rate:g}") for task in (setup.tasks if setup.full else tasks[:1])]
    jobs += [("digits", seed, target) for target in others]
    if setup.full:
        jobs += [("alpha", seed, "ties"), ("alpha", seed, "task_arithmetic")]
    jobs += [("merging", seed, method) for method in merging.methods_of(setup)]
    if setup.full:
        jobs += [("depth-alone", seed, method) for method in merging.SOME_METHODS]
    if setup.light is not None:
        jobs += [("rounding", seed, task, f"{rate:g}") for rate in (setup.light, setup.rate) for task in tasks]
    if setup.full:
        jobs += [("depth", seed, tasks[0]), *(("wise", seed, task) for task in tasks), ("policies", seed, "styles")]
    yield jobs
    if setup.full:
        jobs = [("inspect", seed, task, f"{setup.rate:g}") for task in setup.tasks]
        jobs += [
            (item, seed, method) for item in ("digits-merging", "digits-depth-alone") for method in merging.SOME_METHODS
        ]
        yield jobs + [("digits-tasks", seed, merging.SOME_METHODS[0], str(n)) for n in range(2, len(vision.DOMAINS))]
    if setup.strong is not None:
        yield [("inspect", seed, task, f"{setup.strong:g}") for task in tasks]


JOBS: dict[str, Callable[..., object]] = {
    "train": trained,
    "one": one.run,
    "digits": vision.run,
    "merging": merging.run,
    "digits-merging": vision.run_merging,
    "digits-tasks": vision.run_tasks,
    "depth-alone": merging.run_alone,
    "digits-depth-alone": vision.run_alone,
    "policies": policies.run,
    "soups": soups.run_soup,
    "wise": soups.run_wise,
    "depth": ablations.run_depth,
    "alpha": ablations.run_alpha,
    "inspect": ablations.run_inspect,
    "rounding": ablations.run_rounding,
}


def run_job(setup: Setup, job: Job) -> None:
    """Do one job, in this process."""
    name, seed, of, *rate = job
    if name not in JOBS:
        raise SystemExit(f"{name} is no job: {', '.join(JOBS)}")
    JOBS[name](setup, int(seed), of, *map(float, rate))


def run_all(setup: Setup, jobs: int) -> None:
    """Every job, each in a process of its own, some at a time; the first that fails ends the run."""
    flags = ["--full"] if setup.full else []
    save_setup(setup)
    check_setup(setup)
    pools(Path(setup.work))  # fetched and made once, before several processes want them
    base_folder(Path(setup.work))

    def start(job: Job) -> None:
        if result_path(setup, *job).exists():
            return  # a job would say so, too, once it had begun
        print("$", *job, flush=True)
        subprocess.run([sys.executable, "-m", "evidence", *flags, *job], cwd=ROOT, check=True)

    with ThreadPoolExecutor(jobs) as pool:
        for seed in map(str, setup.seeds):  # seed by seed, so that what a run that was ended has is of use
            left = list(phases(setup, seed))
            if any(job[0] != "train" and not result_path(setup, *job).exists() for phase in left for job in phase):
                for phase in left:  # a fine-tune is no result: it is trained where a result is missing
                    list(pool.map(start, phase))


def main() -> None:
    parser = argparse.ArgumentParser(description="LiNeS on models that are really trained.")
    parser.add_argument("--full", action="store_true", help="every item and every seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("job", nargs="*")
    args = parser.parse_args()
    setup = FULL if args.full else QUICK
    if args.job == ["page"]:
        write_page()
    elif args.job == ["publish"]:
        publish(setup)
    elif args.job:
        run_job(setup, tuple(args.job))
    else:
        run_all(setup, args.jobs)
        publish(setup)


if __name__ == "__main__":
    main()
