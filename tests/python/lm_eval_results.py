"""Runs tasks of tests/fixtures/lm_eval and prints what came of them: python lm_eval_results.py KIND MODEL_ARGS BATCH_SIZE TASK...

As JSON: of each task its metrics, and of each item what the model answered. It does what `lm_eval run` does, but leaves out the
thousands of tasks that come with lm-eval, which it takes a quarter of a minute to list.
"""

import contextlib
import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

kind, model_args, batch_size, *tasks = sys.argv[1:]
with contextlib.redirect_stdout(sys.stderr):
    evaluation = lm_eval.simple_evaluate(
        kind,
        model_args=model_args,
        batch_size=int(batch_size),
        tasks=tasks,
        task_manager=TaskManager(include_path="tasks", include_defaults=False),
        apply_chat_template=kind == "local-chat-completions",
    )
metrics, samples = evaluation["results"], evaluation["samples"]
results = {
    task: {
        "metrics": {name: value for name, value in metrics[task].items() if name.endswith(",none")},
        "items": [sample["resps"] for sample in sorted(samples[task], key=lambda sample: sample["doc_id"])],
    }
    for task in tasks
}
print(json.dumps(results, default=float))
