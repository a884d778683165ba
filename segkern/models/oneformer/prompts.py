"""What OneFormer reads: the words that name a task, and sentences about what an image shows.

    task:      "the task is panoptic"
    sentences: "a photo with a NAME" of each class, then "a panoptic photo", "an instance photo"
               and "a semantic photo", as rows of tokens

Tasks are three constants. Sentences are needed in training alone; a model keeps their tokens, so
that no tokenizer is needed to train it again. Of the words in clip_words.py tokens are known here;
those of others come from CLIP's vocabulary, which the caller has: nothing is downloaded.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from zlib import crc32

from ...structures.targets import TASKS
from .clip_words import WORDS

START, END = 49406, 49407  # of CLIP's vocabulary
_THE_TASK_IS = (518, 10549, 533)
TASK_TOKENS = {
    task: (START, *_THE_TASK_IS, *word, END)
    for task, word in (
        ("panoptic", (1072, 24755)),
        ("instance", (34572,)),
        ("semantic", (29119, 1550)),
    )
}
_OTHERS = ("a panoptic photo", "an instance photo", "a semantic photo")  # in the order of TASKS
_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")  # as CLIP cuts words

Tokenizer = Callable[[str], Sequence[int]]


def task_names(tasks: str | Sequence[str], batch: int) -> list[str]:
    """The task of all images, [1], or of each, [batch]: of names or of their sentences.

    Raises:
        ValueError: no such task, or not as many as images.
    """
    one = isinstance(tasks, str)  # whatever the batch: a graph may be of any
    named = [tasks] if one else tasks
    if isinstance(named, (list, tuple)):
        named = [str(task).removeprefix("the task is ") for task in named]
    fits = isinstance(named, list) and (one or len(named) == batch)
    if not fits or not set(named) <= set(TASKS):
        raise ValueError(
            f"OneFormer: task_inputs must be of {', '.join(TASKS)}, one or {batch}, one for each "
            f"image, or a tensor of their tokens, got {tasks!r:.80}"
        )
    return named


def sentences(names: Sequence[str]) -> list[str]:
    """Those of K classes, then those of the tasks: K + 3."""
    return [f"a photo with a {name}" for name in names] + list(_OTHERS[: len(TASKS)])


def token_rows(
    names: Sequence[str], tokenizer: Tokenizer, context: int, vocabulary: int
) -> tuple[tuple[int, ...], ...]:
    """The tokens of all sentences.

    Args:
        names: of the K classes.
        tokenizer: text to ids, the largest of which ends the text, as CLIP's does; what follows
            may only be padding: zeros, or that id again. What it returns may be a list, a tensor
            or a dict with "input_ids".
        context: the most tokens of a sentence; a longer one loses those before its end.
        vocabulary: ids must be less.

    Returns:
        K + 3 rows, without padding.

    Raises:
        ValueError: the tokenizer gives something else; names the sentence.
    """
    rows = []
    for text in sentences(names):
        found = tokenizer(text)
        found = found["input_ids"] if hasattr(found, "keys") else found
        found = found.tolist() if hasattr(found, "tolist") else list(found)
        if len(found) == 1 and isinstance(found[0], (list, tuple)):  # a batch of one
            found = list(found[0])
        if not found or not all(isinstance(i, int) and 0 <= i < vocabulary for i in found):
            raise ValueError(
                f"prompts: tokenizer must give ids in [0, {vocabulary}) of {text!r}, got {found}"
            )
        last = max(found)
        end = found.index(last) + 1
        if set(found[end:]) - {0, last}:
            raise ValueError(
                "prompts: tokenizer must end a text with its largest id, as CLIP's does, "
                f"got {found} of {text!r}"
            )
        row = found[:end]
        rows.append(tuple(row if end <= context else [*row[: context - 1], last]))
    return tuple(rows)


def known_words(text: str) -> list[int]:
    """CLIP's tokens of a text whose words are all in `clip_words.WORDS`.

    Raises:
        ValueError: there are others; names them and says where their tokens come from.
    """
    pieces = _PIECES.findall(text.lower())
    if unknown := sorted(set(pieces) - WORDS.keys()):
        raise ValueError(
            f"prompts: the tokens of {', '.join(map(repr, unknown))} in {text!r} must come from "
            "CLIP's vocabulary, which is not part of segkern: give with_prompts a tokenizer, "
            "such as transformers.CLIPTokenizer.from_pretrained(...), or the folder of one"
        )
    return [START, *(i for piece in pieces for i in WORDS[piece]), END]


def hashed_words(vocabulary: int) -> Tokenizer:
    """A scheme of our own, for models that are trained from scratch and read no other words: a
    number for each word, whatever the others are.

    Args:
        vocabulary: at least 4; 0 is padding, the last two numbers begin and end a text.
    """

    def tokens(text: str) -> list[int]:
        pieces = _PIECES.findall(text.lower())
        ids = [1 + crc32(piece.encode()) % (vocabulary - 3) for piece in pieces]
        return [vocabulary - 2, *ids, vocabulary - 1]

    return tokens


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """CLIP's tokenizer from files that are here.

    Args:
        folder: with tokenizer.json, or with vocab.json and merges.txt, as checkpoints on the hub
            have them; or the name of a model whose files Hugging Face's cache has.

    Raises:
        ImportError: the library that reads the files is not there.
        ValueError: no such files, or those of another vocabulary.
    """
    file = Path(folder).expanduser() / "tokenizer.json"
    try:
        if file.is_file():
            from tokenizers import Tokenizer as Fast

            fast = Fast.from_file(str(file))
            fast.no_padding()

            def tokenizer(text: str) -> list[int]:
                return fast.encode(text).ids
        else:
            from transformers import CLIPTokenizer

            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        raise ImportError(
            f"prompts: the vocabulary in {folder} needs {error.name}: pip install {error.name}"
        ) from error
    except Exception as error:  # tokenizers has no kind of its own for a file that it cannot read
        raise ValueError(
            f"prompts: {folder} must hold tokenizer.json, or vocab.json and merges.txt, here or "
            "in Hugging Face's cache, and does not"
        ) from error
    # transformers also makes a tokenizer of a folder without a vocabulary
    if not _reads_as_clip(tokenizer):
        raise ValueError(f"prompts: {folder} must hold CLIP's vocabulary, and does not")
    return tokenizer


def _reads_as_clip(tokenizer: Tokenizer) -> bool:
    try:
        (row, *_) = token_rows(("dog",), tokenizer, 77, END + 1)
    except ValueError:
        return False
    return row == tuple(known_words("a photo with a dog"))
