"""Our task scores against lm-eval's own, on the same task files and items: how they agree, and what either costs.

`python -m benchmarks.lm_eval_agreement [--limit 100] [--dtype float32] [--shots N] [--tasks piqa ...] [--output FILE]`

Ours is the step `score_task`, in an empty store. Theirs is `lm_eval.simple_evaluate` with a plain `HFLM` on the folder
of the same model, in the folder of the task files (lm-eval takes data files relative to where it runs). Seconds are of
the requests alone, for both: on the clock, and of the processor, which other work on the machine does not lengthen.
`HFLM` gets `softmax_dtype=float32`: with its default, in bfloat16, a log-likelihood has 8 bits.
"""

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.real_model import real_model_folder, report
from covercal.recipe import LanguageTask, Model
from storage.artifacts import ArtifactStore
from tasks.cached import open_store
from tasks.identities import identify_model
from tasks.language_tasks import identify_task, read_task_scores, score_task
from tasks.model import original_decoder

FILES = Path(__file__).parent.parent / "recipes" / "tasks"
TASKS = ("arc_challenge", "arc_easy", "hellaswag", "winogrande", "piqa", "lambada", "mmlu")


@dataclass
class Requests:
    """What was asked of a model and how long it took.

    Attributes
    ----------
    seconds, processor_seconds
        In requests.
    answers
        Log-likelihood and whether greedy, by (context, continuation).
    """

    seconds: float = 0.0
    processor_seconds: float = 0.0
    answers: dict[tuple[str, str], tuple[float, bool]] = field(default_factory=dict)


@contextmanager
def watched() -> Iterator[Requests]:
    """Note what `HFLM.loglikelihood` is asked: our model calls it too."""
    from lm_eval.models.huggingface import HFLM

    seen, own = Requests(), HFLM.loglikelihood

    def noted(self: Any, requests: list[Any], disable_tqdm: bool = False) -> Any:
        started, busy = time.monotonic(), time.process_time()
        answers = own(self, requests, disable_tqdm=True)
        seen.seconds += time.monotonic() - started
        seen.processor_seconds += time.process_time() - busy
        seen.answers |= {each.args: answer for each, answer in zip(requests, answers, strict=True)}
        return answers

    HFLM.loglikelihood = noted
    try:
        yield seen
    finally:
        HFLM.loglikelihood = own


def ours(store: ArtifactStore, folder: Path, task: LanguageTask, dtype: str) -> tuple[dict[str, float], Requests, str]:
    model = identify_model(Model(source=str(folder)), store)
    original_decoder(store, model, None, dtype, "auto")  # loaded before the clock starts
    inputs = {"checkpoint": None, "model": model, "imported": None, "dtype": dtype, "device": "auto"}
    with watched() as seen, tempfile.TemporaryDirectory() as empty:
        fresh = ArtifactStore(Path(empty)).prepare()
        outcome = score_task.run(fresh, "task", {**inputs, "task": identify_task(task, fresh)})
        scores = read_task_scores(fresh, outcome.ref)
    return {name: each["value"] for name, each in scores["metrics"].items()}, seen, scores["path"]


def theirs(folder: Path, task: LanguageTask, dtype: str, rows: int) -> tuple[dict[str, float], Requests]:
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(str(folder), dtype=dtype, device=device, batch_size=rows, softmax_dtype="float32")
    name = Path(str(task.path)).stem
    with watched() as seen, contextlib.chdir(FILES), contextlib.redirect_stderr(io.StringIO()):
        results = simple_evaluate(
            model,
            tasks=[name],
            num_fewshot=task.shots,
            limit=task.limit,
            bootstrap_iters=0,
            fewshot_random_seed=task.seed,
            task_manager=TaskManager(include_defaults=False, include_path=FILES),
        )
    found = results["results"][name]
    values = {key.removesuffix(",none"): value for key, value in found.items() if "," in key and "stderr" not in key}
    return values, seen


def compare(store: ArtifactStore, folder: Path, task: LanguageTask, wanted: argparse.Namespace) -> dict[str, Any]:
    mine, asked, path = ours(store, folder, task, wanted.dtype)
    plain, asked_plainly = theirs(folder, task, wanted.dtype, wanted.batch_size)
    if asked.answers.keys() != asked_plainly.answers.keys():
        raise RuntimeError(f"{task.called}: the two did not make the same requests")
    differences = [abs(value - asked_plainly.answers[pair][0]) for pair, (value, _) in asked.answers.items()]
    greedy = sum(answer[1] != asked_plainly.answers[pair][1] for pair, answer in asked.answers.items())
    return {
        "ours": mine,
        "lm_eval": plain,
        "equal": mine == plain,
        "requests": len(differences),
        "largest_difference": max(differences),
        "greedy_differs": greedy,
        "seconds": round(asked.seconds, 2),
        "lm_eval_seconds": round(asked_plainly.seconds, 2),
        "processor_seconds": round(asked.processor_seconds, 2),
        "lm_eval_processor_seconds": round(asked_plainly.processor_seconds, 2),
        "path": path,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=100, help="items of each task, of MMLU of each subject")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shots", type=int, help="examples before each item; default: what the task says, none")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at once in lm-eval's own model")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--output", type=Path)
    wanted = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    store = open_store()
    folder = real_model_folder(store)
    settings = {"limit": wanted.limit, "dtype": wanted.dtype, "shots": wanted.shots, "batch_size": wanted.batch_size}
    value: dict[str, Any] = {**settings, "tasks": {}}
    rows = []
    for name in wanted.tasks:
        task = LanguageTask(path=str(FILES / f"{name}_local.yaml"), limit=wanted.limit, shots=wanted.shots)
        found = compare(store, folder, task, wanted)
        value["tasks"][name] = found
        for metric, score in found["ours"].items():
            rows.append([name, metric, repr(score), repr(found["lm_eval"][metric]), *_verdict(found, metric)])
        print(f"{name}: {found['seconds']} s, lm-eval {found['lm_eval_seconds']} s", file=sys.stderr, flush=True)
    columns = ["task", "metric", "ours", "lm-eval", "equal", "largest Δ log p", "s", "lm-eval", "CPU s", "lm-eval"]
    shots = "shots as the task says" if wanted.shots is None else f"{wanted.shots} shots"
    title = f"SmolLM2-135M, dequantised Q4_1, {wanted.dtype}, {wanted.limit} items of each task, {shots}"
    report(title, columns, rows, value, wanted.output)


def _verdict(found: dict[str, Any], metric: str) -> list[str]:
    equal = found["ours"][metric] == found["lm_eval"][metric]
    kinds = ("seconds", "lm_eval_seconds", "processor_seconds", "lm_eval_processor_seconds")
    seconds = (f"{found[kind]:.1f}" for kind in kinds)
    return ["yes" if equal else "no", f"{found['largest_difference']:.1e}", *seconds]


if __name__ == "__main__":
    main()
