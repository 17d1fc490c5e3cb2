"""The functions of the digits tasks: how lmms-eval reads one record of our LLaVA JSON, and when an answer is right."""

from pathlib import Path

from PIL import Image

_FOLDER = Path(__file__).resolve().parent.parent


def digit_questions(docs):
    return _about(docs, "digit")


def parity_questions(docs):
    return _about(docs, "parity")


def doc_to_visual(doc):
    with Image.open(_FOLDER / doc["image"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc):
    return doc["conversations"][0]["value"].replace("<image>", "").strip()


def doc_to_target(doc):
    return doc["conversations"][1]["value"]


def process_results(doc, results):
    return {"accuracy": float(results[0].strip() == doc_to_target(doc))}


def _about(docs, task):
    return docs.filter(lambda doc: doc["id"].endswith(f"-{task}"))
