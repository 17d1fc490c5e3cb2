"""The twelve benchmarks as tiny local files, laid out as on the hub, with two questions each: the answers make 50%.

The first question of each is answered right and the second wrong (ANSWERS); what a column then shows is EXPECTED.
"""

import json
from pathlib import Path

from PIL import Image

HUB = "lmms-lab-encoder"
OPTIONS = ["a cat", "a dog"]


def pair(name: str) -> tuple[str, str]:
    return f"{name} first?", f"{name} second?"


def _rows() -> dict[tuple[str, str | None, str], list[dict]]:
    """(repository, configuration, split) -> documents."""
    picture = Image.new("RGB", (20, 12), "red")
    image = {"image": picture}

    def rows(name: str, *differing: dict, **same) -> list[dict]:
        return [
            {"question": question, **image, **same, **own}
            for question, own in zip(pair(name), differing or ({}, {}), strict=True)
        ]

    identity = {"subcategory": "chart", "set_id": "1", "visual_input": "1", "gt_answer": "1"}
    mmbench = {"hint": "", "A": "a cat", "B": "a dog", "C": None, "D": None, "source": "x", "split": "dev"}
    about = {"split": "testmini", "language": "english", "source": "x", "category": "math", "task": "vqa"}
    about |= {"context": "scene", "grade": "school", "skills": ["arithmetic"]}
    subject = {"options": str(OPTIONS), "question_type": "multiple-choice", "answer": "A"}
    subject |= {f"image_{i}": picture if i == 1 else None for i in range(1, 8)}
    return {
        (f"{HUB}/ai2d", None, "test"): rows("AI2D", options=OPTIONS, answer="0"),
        (f"{HUB}/ChartQA", None, "test"): rows("ChartQA", answer="10", type="human_test"),
        (f"{HUB}/textvqa", None, "validation"): rows(
            "TextVQA", {"question_id": 1}, {"question_id": 2}, answers=["stop"] * 10, ocr_tokens=["stop"]
        ),
        (f"{HUB}/GQA", "testdev_balanced_instructions", "testdev"): [
            {"id": str(i), "imageId": "n1", "question": q, "answer": "yes"} for i, q in enumerate(pair("GQA"))
        ],
        (f"{HUB}/GQA", "testdev_balanced_images", "testdev"): [{"id": "n1", **image}],
        (f"{HUB}/HallusionBench", None, "image"): rows(
            "Hallusion",
            {"question_id": "0", "category": "VD", "figure_id": "1"},
            {"question_id": "1", "category": "VS", "figure_id": "1"},
            gt_answer_details="It is red.",
            **identity,
        ),
        ("AI4Math/MathVista", None, "testmini"): [
            {
                **row,
                "decoded_image": picture,
                "question_type": "free_form",
                "answer_type": "integer",
                "unit": None,
                "choices": None,
                "precision": None,
                "answer": "4",
                "query": row["question"],
                "metadata": about,
            }
            for row in rows("MathVista", {"pid": "1"}, {"pid": "2"})
        ],
        (f"{HUB}/MMBench", "en", "dev"): rows(
            "MMBench", {"index": 1}, {"index": 2}, answer="A", category="color", **{"L2-category": "coarse"}, **mmbench
        ),
        (f"{HUB}/MMMU", None, "validation"): [
            {**row, "question": f"<image 1> {row['question']}", **subject}
            for row in rows("MMMU", {"id": "validation_Art_1"}, {"id": "validation_Art_2"})
        ],
        ("Lin-Chen/MMStar", None, "val"): rows(
            "MMStar", {"index": 1}, {"index": 2}, answer="A", category="math", l2_category="geometry"
        ),
        (f"{HUB}/POPE", None, "test"): rows("POPE", {"question_id": "1"}, {"question_id": "2"}, answer="yes"),
        (f"{HUB}/ScienceQA", "ScienceQA-FULL", "test"): rows("ScienceQA", choices=OPTIONS, answer=0, hint=""),
        (f"{HUB}/MME", None, "test"): [
            {**image, "question_id": f"{category}/1.png", "question": q, "answer": "Yes", "category": category}
            for name, category in (("MME-P", "existence"), ("MME-C", "code_reasoning"))
            for q in pair(name)
        ],
    }


# What the model says to the first question and to the second one.
ANSWERS = {
    "AI2D": ("A.", "B."),
    "ChartQA": ("10", "99"),
    "TextVQA": ("stop", "go"),
    "GQA": ("yes", "no"),
    "Hallusion": ("It is red, as is right.", "It is blue."),  # judged: see the judge in test_suite.py
    "MathVista": ("4", "I cannot tell"),  # the second is judged
    "MMBench": ("A", "B"),
    "MMMU": ("A", "B"),
    "MMStar": ("A", "B"),
    "POPE": ("yes", "no"),
    "ScienceQA": ("A", "B"),
    "MME-P": ("Yes", "No"),
    "MME-C": ("Yes", "No"),
}
# MME: each of the two categories has 50 for its questions and 0 for pairs that are right as a whole.
EXPECTED = {
    **dict.fromkeys(("AI2D", "ChartQA", "TextVQA", "GQA", "Hallusion", "MathVista", "MMBench EN"), 50.0),
    **dict.fromkeys(("MMMU", "POPE", "ScienceQA"), 50.0),
    "MMStar": 50.0,
    "MME": 100.0,
}


def answer_to(prompt: str) -> str:
    for name, (right, wrong) in ANSWERS.items():
        if f"{name} first?".lower() in prompt.lower():  # TextVQA's task changes the case
            return right
        if f"{name} second?".lower() in prompt.lower():
            return wrong
    raise AssertionError(f"no answer to {prompt!r}")


def write_benchmarks(folder: Path) -> Path:
    import datasets

    cards: dict[Path, list[dict]] = {}
    for (repository, config, split), rows in _rows().items():
        place = folder / repository
        file = f"{config or 'data'}/{split}-00000-of-00001.parquet"
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        features = {"image", "decoded_image", *(f"image_{i}" for i in range(1, 8))} & rows[0].keys()
        table = datasets.Dataset.from_list(
            [{name: value for name, value in row.items() if name not in features} for row in rows]
        )
        for name in sorted(features):
            column = datasets.Dataset.from_dict(
                {name: [row[name] for row in rows]}, features=datasets.Features({name: datasets.Image()})
            )
            table = datasets.concatenate_datasets([table, column], axis=1)
        table.to_parquet(place / file)
        cards.setdefault(place, []).append(
            {"config_name": config or "default", "data_files": [{"split": split, "path": file}]}
        )
    for place, configs in cards.items():
        (place / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return folder
