"""Answers a file of requests through the official openai client, the whole way: python openai_batches.py http://host:port MODEL"""

import io
import json
import sys
import time

import openai
from openai import OpenAI

BASE, MODEL = sys.argv[1] + "/v1", sys.argv[2]
client = OpenAI(base_url=BASE, api_key="not needed", max_retries=0, timeout=60)
ENDPOINT = "/v1/chat/completions"


def line(number, **body):
    messages = [{"role": "user", "content": f"What is {number} + 1?"}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 8, **body}
    return {"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body}


def upload(lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return client.files.create(file=("requests.jsonl", io.BytesIO(text.encode())), purpose="batch")


def create(file, **more):
    return client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", **more)


def wait(batch):
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def lines(file):
    return {line["custom_id"]: line for line in map(json.loads, client.files.content(file).text.splitlines())}


asked = [line(number) for number in range(20)] + [line(20, temperature=9)]
file = upload(asked)
assert file.purpose == "batch" and file.bytes > 0
batch = create(file, metadata={"team": "a"}, output_expires_after={"anchor": "created_at", "seconds": 3600})
assert batch.object == "batch" and batch.status in ("validating", "in_progress") and batch.metadata == {"team": "a"}
assert batch.expires_at == batch.created_at + 24 * 3600 and batch.input_file_id == file.id
batch = wait(batch)
assert batch.status == "completed" and batch.model == MODEL and batch.errors is None, batch
counts = batch.request_counts
assert (counts.total, counts.completed, counts.failed) == (21, 20, 1), counts
answers, errors = lines(batch.output_file_id), lines(batch.error_file_id)
assert len(answers) == 20 and list(errors) == ["line-20"]
assert errors["line-20"]["response"]["body"]["error"]["param"] == "temperature"
used = 0
for request in asked[:20]:
    body = answers[request["custom_id"]]["response"]["body"]
    alone = client.chat.completions.create(**request["body"])
    assert body["choices"][0]["message"]["content"] == alone.choices[0].message.content
    used += body["usage"]["total_tokens"]
assert batch.usage.total_tokens == used and batch.usage.input_tokens_details.cached_tokens >= 0
output = client.files.retrieve(batch.output_file_id)
assert output.purpose == "batch_output" and output.expires_at == output.created_at + 3600

failed = wait(create(upload([line(1), line(2), line(1)])))
assert failed.status == "failed" and failed.errors.data[0].line == 3, failed
assert failed.errors.data[0].code == "duplicate_custom_id" and failed.output_file_id is None

many = create(upload([line(number, max_tokens=60, ignore_eos=True) for number in range(2000)]))
cancelling = client.batches.cancel(many.id)
assert cancelling.status in ("cancelling", "cancelled") and cancelling.cancelling_at is not None
assert wait(cancelling).cancelled_at is not None
assert [one.id for one in client.batches.list(limit=2)] == [many.id, failed.id, batch.id], "all pages, the latest first"

for error, function in [
    (openai.NotFoundError, lambda: client.batches.retrieve("batch_none")),
    (openai.ConflictError, lambda: client.batches.cancel(batch.id)),
    (openai.BadRequestError, lambda: client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")),
]:
    try:
        function()
    except error:
        continue
    raise AssertionError(f"{error} was expected")
print("passed")
