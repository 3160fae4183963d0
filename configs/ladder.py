"""The stages below every method, sft and rm, and what every recipe can be pointed at.

    python -m rlhf_jax.main --config configs/ladder.py --workdir runs/ladder
    python -m rlhf_jax.main --config configs/ladder.py:smoke --workdir runs/smoke
    python -m rlhf_jax.main --config configs/ladder.py:model=DIR,data=SPEC --workdir DIR
    python -m rlhf_jax.main --config configs/ladder.py:scratch --workdir runs/scratch

By default the base model that the package ships, which knows the text of the tiny
summarisation world, learns to write summaries as its labellers do (sft), and a reward
model learns from comparisons (rm). With ``scratch`` a base model is pretrained first.
The recipes of single methods differ by one section.

Arguments, of all of them: ``model`` a Hugging Face directory or hub name; ``data`` a
data spec (docs/data.md) of comparisons, of which the chosen are demonstrations too and
the last tenth is held out, such as ``hh:FILE`` or ``jsonl:FILE``; ``prompts`` a data
spec, where the prompts are not those of ``data``; ``length`` and ``response`` the
longest text and response of such data, in tokens, texts are cut from the left;
``learning_rate`` of sft, on which the others depend (5e-5 with a ``model``; one of
under a million parameters wants 1e-3); ``from`` a finished run to take sft and rm from;
``smoke``, ``seed=N``. With ``data`` there is no gold reward: the report says what the
learned reward did, and that this alone proves nothing.
"""

from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.config import parse_arg, section
from rlhf_jax.sharding import ParallelConfig
from rlhf_jax.stages.kinds import stage
from rlhf_jax.stages.settings import ModelSettings

DATA = 'tfds:tiny_tldr'
GOLD = dict(fn='rlhf_jax.datasets.tiny_tldr:gold')
LENGTHS = dict(prompt_buckets=(56,), max_new_tokens=28)  # of the tiny world
# Muon seemed to learn copying from far back in fewer steps than AdamW.
COPYING = dict(
    name='muon',
    learning_rate=1e-2,
    adam_learning_rate=2e-3,
    warmup_percent=5,
    final_percent=10,
    weight_decay=0.01,
    b2=0.98,
)


def arguments(arg: str | None, **own: Any) -> ConfigDict:
    """What every recipe takes, and what it takes by itself."""
    return parse_arg(
        arg,
        model='',
        data='',
        prompts='',
        length=256,
        response=64,
        learning_rate=0.0,
        smoke=False,
        seed=0,
        **own,
        **{'from': ''},
    )


def rates(arg: ConfigDict, sft: float, rm: float, online: float) -> tuple[float, ...]:
    """The learning rates of sft, rm and a method: those given, unless told."""
    rate = arg.learning_rate or (5e-5 if arg.model else 0.0)
    return (rate, rate / 3, rate / 10) if rate else (sft, rm, online)


def texts(arg: ConfigDict, own: str, length: int) -> dict[str, Any]:
    """What a stage over fixed data reads: of ``data``, or the tiny world's ``own``."""
    if not arg.data:
        data = f'{DATA}/{own}'
        return dict(train=f'{data}:train', eval=f'{data}:test', buckets=(length,))
    buckets = (arg.length // 2, arg.length)
    reading = dict(buckets=buckets, overlong='truncate', on_bad='skip')
    return dict(train=f'{arg.data}[:90%]', eval=f'{arg.data}[90%:]', **reading)


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    return below(None, arguments(arg, scratch=False))


def below(method: str | None, arg: ConfigDict) -> ConfigDict:
    """The stages below a method, and its name, whose section is still to be set."""
    is_scratch = 'scratch' in arg and arg.scratch
    config = ConfigDict()
    config.seed = arg.seed
    config.stages = ('pretrain', 'sft', 'rm') if is_scratch else ('sft', 'rm')
    if method is not None:
        config.stages = (method,) if arg['from'] else (*config.stages, method)
    config.tokenizer = arg.model or 'rlhf_jax.datasets.tiny_tldr:tokenizer'
    config.metrics = ('jsonl',)
    # Unrolled: the layers are few, and XLA runs them faster so on a CPU.
    preset = 'nano' if arg.smoke else 'micro'
    small = {} if arg.model else dict(preset=preset, scan_unroll=4)
    config.model = section(ModelSettings, **small)
    config.parallel = section(ParallelConfig)
    if is_scratch:
        config.pretrain = pretraining(arg.smoke)
    sft_rate, rm_rate, _ = rates(arg, 1.5e-3, 1.2e-3, 0.0)
    steps = dict(num_steps=20) if arg.smoke else dict(num_epochs=1.0)
    config.sft = stage(
        'sft',
        init='pretrain' if is_scratch else arg.model or 'tiny',
        batch_size=8 if arg.smoke else 32,
        optim=dict(learning_rate=sft_rate, warmup_percent=5),
        loop=dict(eval_every_steps=50),
        **texts(arg, 'demonstrations', 80),
        **(steps if arg.data else dict(num_steps=20 if arg.smoke else 150)),
    )
    config.rm = stage(
        'reward_model',
        init='sft',
        references=f'{arg.data}[90%:]' if arg.data else f'{DATA}/demonstrations:test',
        batch_size=8 if arg.smoke else 32,
        optim=dict(learning_rate=rm_rate, warmup_percent=5),
        loop=dict(eval_every_steps=200),
        **texts(arg, 'comparisons', 88),
        **(steps if arg.data else dict(num_steps=20 if arg.smoke else 450)),
    )
    return config


def pretraining(smoke: bool) -> ConfigDict:
    """The stage that makes a base model from nothing."""
    return stage(
        'sft',
        init='scratch',
        form='text',
        train=f'{DATA}/articles:train',
        eval=f'{DATA}/articles:test',
        num_steps=20 if smoke else 1400,
        batch_size=8 if smoke else 16,
        buckets=(112,),
        optim=COPYING | dict(learning_rate=2e-2, adam_learning_rate=4e-3),
        loop=dict(eval_every_steps=200),
    )


def judged(arg: ConfigDict) -> dict[str, Any]:
    """What every method is judged by, and how its policy samples."""
    rows = 32 if arg.smoke else 128
    if not (arg.data or arg.prompts):
        held_out = f'{DATA}/prompts:test'
        return {
            'eval_prompts': f'{held_out}[:32]' if arg.smoke else held_out,
            'gold': GOLD,
            'eval_batch_size': rows,
            **LENGTHS,
        }
    return {
        'eval_prompts': f'{arg.prompts or arg.data}[{"99%" if arg.smoke else "90%"}:]',
        'gold': None,
        'prompt_buckets': (arg.length - arg.response,),
        'max_new_tokens': arg.response,
        'eval_batch_size': rows,
        'overlong': 'truncate',
        'on_bad': 'skip',
        'expected_win_rate': 0.5,
    }


def online(arg: ConfigDict) -> dict[str, Any]:
    """What every online method has in common: start, reward, prompts, budget, rate."""
    run = f'{arg["from"]}/' if arg['from'] else ''
    source = arg.prompts or arg.data
    *_, rate = rates(arg, 0.0, 0.0, 5e-4)
    return judged(arg) | {
        'init': f'{run}sft',
        'rewards': {'rm': dict(model=f'{run}rm')},
        'prompts': f'{source}[:90%]' if source else f'{DATA}/prompts:train',
        'batch_size': 16 if arg.smoke else 64,
        'num_rollouts': 4 if arg.smoke else 80,
        'missing_eos_penalty': 1.0,
        'optim': dict(learning_rate=rate, schedule='linear', eps=1e-5),
        'loop': dict(log_every_steps=1, save_every_steps=20),
    }
