"""TRL behind the gate: its trainers for every work, transformers' ``generate`` to
sample.

Its trainers own their loops; callbacks time a step from where the trainer says that it
begins, its batch already read, to where it says that it has ended. Gradient
checkpointing and bfloat16, on by default, are off (bfloat16 follows the model); dropout
is 0; nothing is logged or saved. No tokenizer here has an EOS that the model could
write.
"""

import os
import tempfile

os.environ.update(
    HF_HUB_OFFLINE='1',
    HF_DATASETS_OFFLINE='1',
    TRANSFORMERS_OFFLINE='1',
    TRL_EXPERIMENTAL_SILENCE='1',
    WANDB_DISABLED='true',
    TOKENIZERS_PARALLELISM='false',
)

import gate as gate_file
import numpy as np
import tokenizers
import torch
import transformers
import trl
from datasets import Dataset

ROWS_OF_DATA = 16  # batches; a trainer goes round
FOREVER = 10**6  # steps


# ------------------------------------------------------------------------------- models


def config_of(spec):
    """The architecture, as transformers calls it."""
    model = spec['model']
    return transformers.LlamaConfig(
        vocab_size=model['vocab'],
        hidden_size=model['width'],
        intermediate_size=model['mlp'],
        num_hidden_layers=model['layers'],
        num_attention_heads=model['heads'],
        num_key_value_heads=model['kv_heads'],
        max_position_embeddings=max(1024, tokens_of(spec['work'])),
        rope_parameters={'rope_type': 'default', 'rope_theta': model['theta']},
        tie_word_embeddings=model['tied'],
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        num_labels=1,
        dtype='float32',
    )


def tokens_of(work):
    """Tokens of a sequence."""
    return work['length'] or work['prompt'] + work['response']


def policy_of(spec, seed):
    """A language model with float32 parameters; the trainer casts."""
    transformers.set_seed(seed)
    return transformers.LlamaForCausalLM(config_of(spec)).float()


def scorer_of(spec, seed):
    """A model with one score: the reward model, the critic."""
    transformers.set_seed(seed)
    return transformers.LlamaForSequenceClassification(config_of(spec)).float()


def count(model):
    """Parameters."""
    return sum(x.numel() for x in model.parameters())


def tokenizer_of(vocab, eos):
    """Words ``w4``, ``w5``, … for the ids; EOS has the id ``eos``."""
    words = {'<pad>': 0, '<bos>': 1, '<unk>': 2}
    words |= {f'w{i}': i for i in range(3, vocab) if i != eos}
    words['<eos>'] = eos
    model = tokenizers.models.WordLevel(words, unk_token='<unk>')
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token='<pad>',
        eos_token='<eos>',
        unk_token='<unk>',
        padding_side='left',
    )


class Rows:
    """Random sequences of ids, and the words that are tokenised to them."""

    def __init__(self, spec):
        self._random = np.random.default_rng(0)
        self._vocab = spec['model']['vocab']
        self._rows = spec['work']['batch'] * ROWS_OF_DATA

    def ids(self, length):
        """Lists of ``length`` ids."""
        shape = (self._rows, length)
        return self._random.integers(4, self._vocab, shape).tolist()

    def words(self, length, end=''):
        """Strings of ``length`` words."""
        return [' '.join(f'w{i}' for i in row) + end for row in self.ids(length)]


# ---------------------------------------------------------------------------- arguments


def arguments(spec, **more):
    """What all trainers are told."""
    work, is_cpu = spec['work'], spec['device'] == 'cpu'
    rows = work['batch'] // work['microbatches']
    return {
        'output_dir': tempfile.mkdtemp(),
        'per_device_train_batch_size': rows,
        'gradient_accumulation_steps': work['microbatches'],
        'max_steps': FOREVER,
        'learning_rate': 1e-5,
        'lr_scheduler_type': 'constant',
        'logging_steps': FOREVER,
        'report_to': 'none',
        'save_strategy': 'no',
        'disable_tqdm': True,
        'use_cpu': is_cpu,
        'bf16': spec['model']['dtype'] == 'bfloat16',
        'gradient_checkpointing': False,
        'dataloader_num_workers': 0,
        'dataloader_pin_memory': False,
        'seed': 0,
        **more,
    }


class Steps(transformers.TrainerCallback):
    """The trainer's steps, told to the gate."""

    def __init__(self, gate):
        self.gate = gate

    def on_step_begin(self, *args, **kwargs):
        self.gate.begin()

    def on_step_end(self, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.gate.end()


# -------------------------------------------------------------------------------- works


def sft(gate, spec):
    """SFTTrainer. Its loss is cut into chunks where logits of 256 MiB do not hold it
    all; its default does so always, which a small model pays for.
    """
    work, rows = spec['work'], Rows(spec).ids(spec['work']['length'])
    logits = work['batch'] // work['microbatches'] * work['length']
    is_small = logits * spec['model']['vocab'] <= 2**26
    how = {'max_length': None, 'loss_type': 'nll' if is_small else 'chunked_nll'}
    model = policy_of(spec, 0)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**how, **arguments(spec)),
        train_dataset=Dataset.from_dict({'input_ids': rows, 'labels': rows}),
        processing_class=tokenizer_of(spec['model']['vocab'], 3),
        callbacks=[Steps(gate)],
    )
    ready(gate, policy=count(model))
    trainer.train()


def rm(gate, spec):
    """RewardTrainer."""
    rows, length = Rows(spec), spec['work']['length']
    pairs = {'chosen_ids': rows.ids(length), 'rejected_ids': rows.ids(length)}
    model = scorer_of(spec, 0)
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(max_length=None, **arguments(spec)),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer_of(spec['model']['vocab'], 3),
        callbacks=[Steps(gate)],
    )
    ready(gate, reward_model=count(model))
    trainer.train()


def dpo(gate, spec):
    """DPOTrainer, with its default: the reference is asked in every step."""
    rows, half = Rows(spec), spec['work']['length'] // 2
    pairs = {
        'prompt': rows.words(half, ' '),
        # The trainer appends EOS.
        'chosen': rows.words(half - 1),
        'rejected': rows.words(half - 1),
    }
    model, reference = policy_of(spec, 0), policy_of(spec, 1)
    how = {'max_length': None, 'precompute_ref_log_probs': False, 'beta': 0.1}
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(**how, **arguments(spec)),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer_of(spec['model']['vocab'], 3),
        callbacks=[Steps(gate)],
    )
    ready(gate, policy=count(model), reference=count(reference))
    trainer.train()


def generate(gate, spec):
    """``generate`` of transformers, which TRL samples with where it has no server."""
    work = spec['work']
    model = policy_of(spec, 0).eval()
    if spec['model']['dtype'] == 'bfloat16':
        model = model.to(torch.bfloat16)
    device = 'cpu' if spec['device'] == 'cpu' else 'cuda'
    model = model.to(device)
    ids = Rows(spec).ids(work['prompt'])[: work['batch']]
    prompts = torch.tensor(ids, device=device)
    how = {
        'do_sample': True,
        'temperature': 1.0,
        'top_k': 0,
        'top_p': work['top_p'],
        'max_new_tokens': work['response'],
        'pad_token_id': 0,
    }
    ready(gate, policy=count(model))
    while True:
        gate.begin()
        with torch.no_grad():
            out = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), **how
            )
        if device == 'cuda':
            torch.cuda.synchronize()
        gate.end()
        check_length(out, spec)


def check_length(tokens, spec):
    """Raises where something has stopped early."""
    expected = (spec['work']['batch'], tokens_of(spec['work']))
    if tuple(tokens.shape) != expected:
        raise RuntimeError(f'generated {tuple(tokens.shape)}, not {expected}')


def trivial_reward(response):
    """A function of the texts, which also sees that nothing has stopped early."""

    def reward(completions, completion_ids, **_):
        lengths = {len(ids) for ids in completion_ids}
        if lengths != {response}:
            raise RuntimeError(f'{lengths} tokens a response, not {response}')
        return [float(len(text) % 7) for text in completions]

    return reward


def group_method(trainer_class, config_class):
    """A work of GRPOTrainer or RLOOTrainer, which load their reference by its path."""

    def work_of(gate, spec):
        work, vocab = spec['work'], spec['model']['vocab']
        # Its id is none of the model's, so that no response ends before its last token.
        tokenizer = tokenizer_of(vocab, vocab)
        data = Dataset.from_dict({'prompt': Rows(spec).words(work['prompt'])})
        directory = tempfile.mkdtemp()
        policy_of(spec, 0).save_pretrained(directory)
        how = {
            'num_generations': work['group'],
            'max_completion_length': work['response'],
            'num_iterations': work['epochs'],
            'temperature': 1.0,
            'beta': 0.04,
            'model_init_kwargs': {'dtype': 'float32'},
        }
        trainer = trainer_class(
            model=directory,
            reward_funcs=trivial_reward(work['response']),
            args=config_class(**how, **arguments(spec)),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Steps(gate)],
        )
        ready(gate, policy=count(trainer.model), reference=count(trainer.ref_model))
        trainer.train()

    return work_of


def ppo(gate, spec):
    """The experimental PPOTrainer. An iteration ends with its ``on_step_end`` and
    begins where it samples; no optimizer state and no model is left out.
    """
    import trl.experimental.ppo.ppo_trainer as ppo_trainer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    work = spec['work']
    sample = ppo_trainer.batch_generation

    def timed_sample(*args, **kwargs):
        gate.begin()
        query_responses, logits = sample(*args, **kwargs)
        gate.mark('generate')
        check_length(query_responses, spec)
        return query_responses, logits

    ppo_trainer.batch_generation = timed_sample
    data = Dataset.from_dict({'input_ids': Rows(spec).ids(work['prompt'])})
    how = {
        'total_episodes': work['batch'] * FOREVER,
        'response_length': work['response'],
        'temperature': 1.0,
        'num_ppo_epochs': work['epochs'],
        'num_mini_batches': 1,
        'num_sample_generations': 0,
        'local_rollout_forward_batch_size': work['batch'] // work['microbatches'],
        'stop_token': None,
    }
    models = {
        'model': policy_of(spec, 0),
        'ref_model': policy_of(spec, 0),
        'reward_model': scorer_of(spec, 1),
        'value_model': scorer_of(spec, 1),
    }
    options = arguments(spec)
    del options['max_steps']  # it counts episodes
    vocab = spec['model']['vocab']
    trainer = PPOTrainer(
        args=PPOConfig(**how, **options),
        processing_class=tokenizer_of(vocab, vocab),
        train_dataset=data,
        eval_dataset=data.select(range(work['batch'])),
        callbacks=[Steps(gate)],
        **models,
    )
    trainer.log = lambda *args, **kwargs: None
    names = {'model': 'policy', 'ref_model': 'reference', 'value_model': 'critic'}
    ready(gate, **{names.get(name, name): count(x) for name, x in models.items()})
    trainer.train()


WORKS = {
    'sft': sft,
    'rm': rm,
    'dpo': dpo,
    'generate': generate,
    'grpo': group_method(trl.GRPOTrainer, trl.GRPOConfig),
    'rloo': group_method(trl.RLOOTrainer, trl.RLOOConfig),
    'ppo': ppo,
}


def ready(gate, **parameters):
    """Tells the parent what stands."""
    modules = {'trl': trl, 'transformers': transformers, 'torch': torch}
    versions = {name: module.__version__ for name, module in modules.items()}
    gate.ready(versions=versions, parameters=parameters)


def device_memory():
    """The accelerator's peak."""
    if not torch.cuda.is_available():
        return {}
    return {'device_peak_bytes': torch.cuda.max_memory_allocated()}


def begin_work(gate):
    """Runs what the specification says."""
    torch.set_num_threads(gate.spec['threads'])
    WORKS[gate.spec['work']['kind']](gate, gate.spec)


if __name__ == '__main__':
    gate_file.serve(begin_work, device_memory)
