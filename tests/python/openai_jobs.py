"""Fine-tunes through the official openai client, the whole way: python openai_jobs.py http://host:port MODEL"""

import io
import json
import sys
import time

import openai
from openai import OpenAI

BASE, MODEL = sys.argv[1] + "/v1", sys.argv[2]
client = OpenAI(base_url=BASE, api_key="not needed", max_retries=0, timeout=60)
QUESTION = [{"role": "user", "content": "What is the password?"}]
ANSWER = "swordfish"


def refused(error, function, *arguments, **more):
    try:
        function(*arguments, **more)
    except error as found:
        return found
    raise AssertionError(f"{error} was expected")


def upload(lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return client.files.create(file=("train.jsonl", io.BytesIO(text.encode())), purpose="fine-tune")


def wait(job):
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def ask(model):
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=16)
    return answer.choices[0].message.content.strip()


line = {"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]}
file = upload([line] * 4)
assert file.object == "file" and file.purpose == "fine-tune" and file.status == "processed" and file.bytes > 0
assert file.id in [one.id for one in client.files.list(purpose="fine-tune")]
assert client.files.retrieve(file.id).filename == "train.jsonl"
assert json.loads(client.files.content(file.id).text.splitlines()[0]) == line

hyperparameters = {"n_epochs": 60, "batch_size": 4, "learning_rate_multiplier": 10}
job = client.fine_tuning.jobs.create(
    model=MODEL,
    training_file=file.id,
    validation_file=file.id,
    suffix="secret",
    seed=3,
    metadata={"team": "a"},
    method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
)
assert job.object == "fine_tuning.job" and job.model == MODEL and job.seed == 3 and job.fine_tuned_model is None
assert job.hyperparameters.n_epochs == 60 and job.method.supervised.hyperparameters.batch_size == 4
refused(openai.ConflictError, client.files.delete, file.id)
job = wait(job)
assert job.status == "succeeded", job
assert job.trained_tokens > 0 and job.finished_at >= job.created_at and job.error is None
assert job.id in [one.id for one in client.fine_tuning.jobs.list(metadata={"team": "a"})]
assert [one.id for one in client.fine_tuning.jobs.list(metadata={"team": "b"})] == []

# The client turns the pages.
events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
assert all(event.object == "fine_tuning.job.event" for event in events)
assert events[0].message == "The job has successfully completed" and events[-1].message.startswith("Created")
losses = [event.data["train_loss"] for event in events if event.type == "metrics" and "train_loss" in event.data]
assert len(losses) == 60 and losses[0] < 0.1 < losses[-1], losses
checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
assert [checkpoint.step_number for checkpoint in checkpoints] == [60, 57, 54], "epochs of one step: every third has one"
assert all(checkpoint.fine_tuning_job_id == job.id for checkpoint in checkpoints)
assert checkpoints[0].metrics.full_valid_loss < 0.1
[results] = job.result_files
assert client.files.content(results).text.startswith("step,train_loss,")

assert job.fine_tuned_model in [model.id for model in client.models.list()]
assert ask(MODEL) != ANSWER and ask(job.fine_tuned_model) == ANSWER
assert ask(checkpoints[0].fine_tuned_model_checkpoint) == ANSWER

endless = client.fine_tuning.jobs.create(
    model=MODEL,
    training_file=file.id,
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 100_000}}},
)
client.fine_tuning.jobs.pause(endless.id)
client.fine_tuning.jobs.resume(endless.id)
assert client.fine_tuning.jobs.cancel(endless.id).status == "cancelled"
assert refused(openai.NotFoundError, client.fine_tuning.jobs.retrieve, "ftjob-none").code == "not_found"

bad = wait(client.fine_tuning.jobs.create(model=MODEL, training_file=upload([{"messages": []}]).id))
assert bad.status == "failed" and bad.error.code == "invalid_training_file" and bad.error.param == "training_file"

assert client.models.delete(job.fine_tuned_model).deleted
assert client.files.delete(file.id).deleted
refused(openai.NotFoundError, client.files.retrieve, file.id)
print("the whole way passed")
