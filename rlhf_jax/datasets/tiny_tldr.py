"""``tiny_tldr``: the embedded data set, a laboratory for the whole ladder on a laptop.

Articles of 40 words, summaries of one sentence, preferences by simulated annotators,
and a gold reward that knows the truth. Nothing is downloaded: the first use writes the
data set in seconds from fixed seeds, in ArrayRecord files and without TensorFlow. Four
configs, each with the splits ``train`` and ``test``, no article in two of them:

* ``articles``: ``text``, an article with questions and retellings about anybody in it,
  or with facts that are called right or wrong, or events retold at once;
* ``demonstrations``: ``prompt``, ``completion``, by decent but imperfect labellers;
* ``comparisons``: ``prompt``, ``chosen``, ``rejected``, with the annotator, both gold
  rewards and the kind of pair;
* ``prompts``: ``prompt``, ``reference`` (a labeller's summary), for PPO.

``comparisons`` gives the comparisons by annotators who like length more or less, and
with a share of the labels flipped.
Importing this module is enough for ``tfds.builder('tiny_tldr/prompts')`` to find it.
The config of a run names :func:`tokenizer` and :func:`gold` by their dotted names. The
world is in ``tiny_world.py``, its writers and judges in ``tiny_people.py``;
``sources.py`` reads all this.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.tokenizer import word_tokenizer
from rlhf_jax.datasets import tiny_people, tiny_world
from rlhf_jax.datasets.tiny_world import SEPARATOR, Article

SEED = 20230  # of every article; example i of a config draws from (SEED, config, i)
CUE = 'TL;DR:'
TRAINING_EXAMPLES = 3_000  # of every config, for the tokenizer
WORDS = Path(__file__).with_name('tiny_tldr_words.txt')


# ------------------------------------------------------------------------------ prompts


def make_prompt(article: str) -> str:
    """What a policy sees: article, empty line, 'TL;DR:'. Answers open with a space."""
    return f'{article}{SEPARATOR}{CUE}'


def gold(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """The gold reward of responses to prompts; ``tiny_world.gold_reward`` defines it.

    Args:
        prompts: texts as :func:`make_prompt` writes them.
        responses: decoded without special tokens.

    Returns:
        [B] float64, reward units.

    Raises:
        ValueError: unequal numbers, or a prompt of something else.
    """
    if len(prompts) != len(responses):
        raise ValueError(
            f'{len(prompts)} prompts and {len(responses)} responses; '
            'pass one response per prompt'
        )
    pairs = zip(prompts, responses)
    return np.array([tiny_world.gold_reward(*pair) for pair in pairs], np.float64)


def answer_as(
    prompts: Sequence[str],
    firsts: Sequence[str],
    seconds: Sequence[str],
    labellers: Sequence[int],
    rng: np.random.Generator,
    length_taste: float = 1.0,
    random: Sequence[int] = (),
    guideline: str | None = None,
) -> np.ndarray:
    """Whether the first response is the better one, each by one annotator of this
    world; see ``tiny_people.answer``.

    Args:
        prompts: N texts as :func:`make_prompt` writes them.
        firsts: N responses.
        seconds: N responses.
        labellers: N, indices into ``tiny_people.ANNOTATORS``, from the start again
            behind its end.
        rng: draws the labels.
        length_taste: multiplies every annotator's ``length_bias``.
        random: those among the labellers who toss a coin.
        guideline: what they go by instead, see ``tiny_people.GUIDELINES``.

    Returns:
        [N] bool.

    Raises:
        ValueError: no such guideline.
    """
    known = tiny_people.GUIDELINES
    if guideline is not None and guideline not in known:
        raise ValueError(f'guideline={guideline!r}; use {", ".join(known)}')
    found = []
    for prompt, *pair, who in zip(prompts, firsts, seconds, labellers, strict=True):
        parts = [tiny_world.gold_parts(prompt, text) for text in pair]
        if guideline is None:
            likes = tiny_people.answer(int(who), *parts, rng, length_taste)
        else:
            likes = tiny_people.answer_by(guideline, int(who), *parts, rng)
        found.append(rng.random() < 0.5 if who in random else likes)
    return np.asarray(found, bool)


def invented(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """How many facts responses state that are none of the article's main event: made
    up, or a stranger's. [N] float64; the arguments are those of :func:`gold`.
    """
    pairs = zip(prompts, responses, strict=True)
    found = [tiny_world.gold_parts(*pair).invented for pair in pairs]
    return np.array(found, np.float64)


def covered(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """How many of the six facts of the main event responses state. [N] float64; the
    arguments are those of :func:`gold`.
    """
    pairs = zip(prompts, responses, strict=True)
    return np.array([tiny_world.gold_parts(*p).covered for p in pairs], np.float64)


def annotate(
    prompts: Sequence[str],
    firsts: Sequence[str],
    seconds: Sequence[str],
    rng: np.random.Generator,
) -> np.ndarray:
    """Whether the annotators of this world call the first response the better one.

    Args:
        prompts: N texts as :func:`make_prompt` writes them.
        firsts: N responses.
        seconds: N responses.
        rng: draws annotators and labels.

    Returns:
        [N] bool.
    """
    found = []
    for prompt, *pair in zip(prompts, firsts, seconds, strict=True):
        parts = [tiny_world.gold_parts(prompt, text) for text in pair]
        found.append(tiny_people.annotate(*parts, rng)[1])
    return np.asarray(found, bool)


# ---------------------------------------------------------------------------- tokenizer


def words_over(
    prompts: Sequence[str], responses: Sequence[str], limit: float
) -> np.ndarray:
    """Words beyond a limit, [N] float64, below 0 within it: a cost to try out
    constraints on.
    """
    return np.asarray([len(text.split()) - limit for text in responses])


def tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the world is a token, as ``tiny_tldr_words.txt`` has them: what
    :func:`rlhf_jax.data.tokenizer.learn_words` learns from :func:`corpus`, kept there
    because it is the same at every start.

    Returns:
        As :func:`rlhf_jax.data.tokenizer.word_tokenizer`.
    """
    return word_tokenizer(WORDS.read_text(encoding='utf-8').split())


def corpus() -> Iterator[str]:
    """The first texts of all four configs, from which the words were learned."""
    for config in CONFIGS:
        for i in range(TRAINING_EXAMPLES):
            for name, text in make_example(config, i).items():
                if isinstance(text, str) and name != 'kind':
                    yield text


# ----------------------------------------------------------------------------- data set

RESTATEMENTS = 7  # per article of the pretraining text
CHATTER = 3  # restatements per person of a text without an article
CHATTER_SHARE = 0.3  # of such texts
CHECKS = 11  # facts called right or wrong, per article of the pretraining text
DRILL = 8  # facts called right or wrong behind a single sentence
CHECKED_SHARE = 0.35  # of such texts


def _drill(article: Article, rng: np.random.Generator) -> dict[str, Any]:
    return {'text': tiny_world.make_drill(article, DRILL, rng)}


def _text_example(article: Article, rng: np.random.Generator) -> dict[str, Any]:
    kind = rng.random()
    if kind < CHATTER_SHARE:
        return {'text': tiny_world.make_chatter(article, CHATTER, rng)}
    if kind < CHATTER_SHARE + CHECKED_SHARE:
        more = tiny_world.make_checks(article.main, article, CHECKS, rng)
    else:
        more = tiny_world.make_restatements(article, RESTATEMENTS, rng)
    return {'text': f'{article.text}{SEPARATOR}{more}'}


def _demonstration(article: Article, rng: np.random.Generator) -> dict[str, Any]:
    summary = tiny_people.make_demonstration(article, rng)
    return {'prompt': make_prompt(article.text), 'completion': ' ' + summary}


def _comparison(
    article: Article, rng: np.random.Generator, length_taste: float = 1.0
) -> dict[str, Any]:
    judgement = tiny_people.make_judgement(article, rng, length_taste)
    return {
        'prompt': make_prompt(article.text),
        **dataclasses.asdict(judgement),
        'chosen': ' ' + judgement.chosen,
        'rejected': ' ' + judgement.rejected,
    }


def _prompt_example(article: Article, rng: np.random.Generator) -> dict[str, Any]:
    reference = tiny_people.make_demonstration(article, rng)
    return {'prompt': make_prompt(article.text), 'reference': ' ' + reference}


_FEATURES = {str: np.str_, int: np.int32, float: np.float32}  # as TFDS stores them
_PAIR = {'prompt': str, 'chosen': str, 'rejected': str}
_JUDGED = {'annotator': int, 'gold_chosen': float, 'gold_rejected': float, 'kind': str}


MakeRecord = Callable[[Article, np.random.Generator], dict[str, Any]]


@dataclasses.dataclass(eq=False, kw_only=True)
class TinyTldrConfig(tfds.core.BuilderConfig):
    """One kind of records: what is in them, how many there are, and what makes one."""

    number: int  # part of the seeds, so that no two configs share an article
    train: int  # examples
    test: int  # examples
    fields: dict[str, type]
    make: MakeRecord


CONFIGS = (
    TinyTldrConfig(
        name='articles',
        number=0,
        train=20_000,
        test=500,
        fields={'text': str},
        make=_text_example,
    ),
    TinyTldrConfig(
        name='demonstrations',
        number=1,
        train=4_000,
        test=500,
        fields={'prompt': str, 'completion': str},
        make=_demonstration,
    ),
    TinyTldrConfig(
        name='comparisons',
        number=2,
        train=20_000,
        test=2_000,
        fields={**_PAIR, **_JUDGED},
        make=_comparison,
    ),
    TinyTldrConfig(
        name='prompts',
        number=3,
        train=4_000,
        test=1_000,
        fields={'prompt': str, 'reference': str},
        make=_prompt_example,
    ),
)


def make_example(config: TinyTldrConfig, i: int) -> dict[str, Any]:
    """Example ``i`` of a config; the test split follows the train split."""
    return _example(config.number, i, config.make)


def _example(number: int, i: int, make: MakeRecord) -> dict[str, Any]:
    rng = np.random.default_rng((SEED, number, i))
    return make(tiny_world.make_article(rng), rng)


class TinyTldr(tfds.core.GeneratorBasedBuilder):
    """Writes ``tiny_tldr`` from fixed seeds."""

    # TFDS reuses what lies on disk under this number: raise it when an example changes.
    VERSION = tfds.core.Version('1.5.0')
    BUILDER_CONFIGS = list(CONFIGS)

    def _info(self) -> tfds.core.DatasetInfo:
        fields = self.builder_config.fields
        return tfds.core.DatasetInfo(
            builder=self,
            description='News of one person among others, with one-sentence summaries, '
            'simulated preferences and a known gold reward.',
            features=tfds.features.FeaturesDict(
                {name: _FEATURES[kind] for name, kind in fields.items()}
            ),
            disable_shuffling=True,  # example i stays example i; readers shuffle
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Any]:
        sizes = self.builder_config
        return {
            'train': self._generate_examples(0, sizes.train),
            'test': self._generate_examples(sizes.train, sizes.train + sizes.test),
        }

    def _generate_examples(
        self, start: int, stop: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(start, stop):
            yield i, make_example(self.builder_config, i)

    def download_and_prepare(
        self,
        *,
        download_dir: str | os.PathLike[str] | None = None,
        download_config: tfds.download.DownloadConfig | None = None,
        file_format: str | tfds.core.FileFormat = 'array_record',
    ) -> None:
        """Writes the data set unless it is there; see the base class for the arguments.

        Deviations: the file format is ArrayRecord unless another is asked for here,
        because TFDS's own default needs TensorFlow; and of two processes that write at
        the same time, the slower one takes over what the faster one wrote instead of
        failing.
        """
        try:
            super().download_and_prepare(
                download_dir=download_dir,
                download_config=download_config,
                file_format=file_format,
            )
        except OSError:  # each writes beside the place and renames at the end
            if not (self.data_path / 'dataset_info.json').exists():
                raise
            self.info.update_data_dir(self.data_dir)


FLIPS = 101  # part of the seed of what is flipped


def comparisons(
    split: str = 'train', length_taste: str = '1', flipped_percent: str = '0'
) -> list[dict[str, Any]]:
    """The config ``comparisons`` with other annotators, as a source:

        python:rlhf_jax.datasets.tiny_tldr:comparisons?length_taste=2
        python:rlhf_jax.datasets.tiny_tldr:comparisons?split=test&flipped_percent=25

    The pairs of summaries are always the same. Exactly the share of the labels is
    flipped, on top of the annotators' own mistakes; those of a smaller share are among
    those of a larger one. A record says so in ``flipped`` (1 or 0); its gold rewards
    stay with their texts.

    Source: a quarter of the labels: Coste et al. 2023, arXiv 2310.02743.

    Args:
        split: 'train' or 'test'; a slice goes behind the whole spec.
        length_taste: multiplies how much every annotator likes a word more, ≥ 0.
        flipped_percent: 0 to 100. Both are text, because they come from a data spec.

    Raises:
        ValueError: no such split, or a number out of range.
    """
    (config,) = (config for config in CONFIGS if config.name == 'comparisons')
    splits = {'train': range(config.train), 'test': range(config.test)}
    try:
        taste, share = float(length_taste), float(flipped_percent) / 100
    except ValueError:
        taste = share = float('nan')
    if split not in splits or not (0 <= share <= 1 and 0 <= taste < float('inf')):
        raise ValueError(
            f'comparisons: split={split!r}, length_taste={length_taste!r}, '
            f"flipped_percent={flipped_percent!r}; use 'train' or 'test', 0 or more, "
            'and 0 to 100'
        )
    start = 0 if split == 'train' else config.train
    rng = np.random.default_rng((SEED, FLIPS, list(splits).index(split)))
    records = [
        _example(
            config.number, start + i, functools.partial(_comparison, length_taste=taste)
        )
        for i in splits[split]
    ]
    flipped = rng.permutation(len(records)) < round(share * len(records))
    return [_turned(record, turn) for record, turn in zip(records, flipped.tolist())]


def _turned(record: dict[str, Any], turn: bool) -> dict[str, Any]:
    if not turn:
        return {**record, 'flipped': 0}
    sides = {'chosen': 'rejected', 'rejected': 'chosen'}
    sides |= {f'gold_{one}': f'gold_{other}' for one, other in sides.items()}
    turned = {one: record[other] for one, other in sides.items()}
    return {**record, **turned, 'flipped': 1}


def more_articles(count: str = '100000') -> list[dict[str, Any]]:
    """Further texts of the config ``articles``, none of which is in its splits:

        python:rlhf_jax.datasets.tiny_tldr:more_articles?count=100000

    Args:
        count: how many, as text, because it comes from a data spec.

    Raises:
        ValueError: ``count`` is no whole number above 0.
    """
    (articles,) = (config for config in CONFIGS if config.name == 'articles')
    return _further(count, articles.number, articles.make)


def drills(count: str = '20000') -> list[dict[str, Any]]:
    """Texts of one sentence with its facts called right or wrong, for a model to learn
    from before it reads articles; see ``tiny_world.make_drill``.

    Args:
        count: how many, as text, because it comes from a data spec.

    Raises:
        ValueError: ``count`` is no whole number above 0.
    """
    return _further(count, 4, _drill)  # a number that no config has


def _further(count: str, number: int, make: MakeRecord) -> list[dict[str, Any]]:
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f'count={count!r}; use a whole number above 0')
    first = sum(c.train + c.test for c in CONFIGS if c.number == number)
    return [_example(number, first + i, make) for i in range(int(count))]


def prepare(
    config_name: str, data_dir: str | os.PathLike[str] | None = None
) -> tfds.core.DatasetBuilder:
    """Writes one config of the data set on first use.

    Args:
        config_name: 'articles', 'demonstrations', 'comparisons' or 'prompts'.
        data_dir: where TFDS keeps its data sets; None for its default place.

    Returns:
        A builder that is ready for ``as_data_source(split)``.

    Raises:
        ValueError: no such config.
    """
    if config_name not in TinyTldr.builder_configs:
        known = ', '.join(TinyTldr.builder_configs)
        raise ValueError(
            f'tiny_tldr has no config {config_name!r}; choose one of {known}'
        )
    builder = TinyTldr(
        config=config_name, data_dir=data_dir, file_format='array_record'
    )
    builder.download_and_prepare()
    return builder
