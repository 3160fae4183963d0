"""Packaging of rlhf_jax. The base install needs neither TensorFlow nor torch."""

from setuptools import find_packages, setup

setup(
    name='rlhf_jax',
    version='0.1.0',
    description='RLHF in JAX and Flax as pure functions: SFT, reward models, PPO.',
    long_description=open('README.md', encoding='utf-8').read(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11',
    packages=find_packages(include=['rlhf_jax', 'rlhf_jax.*']),
    package_data={
        'rlhf_jax': ['py.typed', '*.html'],
        'rlhf_jax.labels': ['*.html', '*.css', '*.js', '*.txt'],
        'rlhf_jax.datasets': ['*.txt', '*.md', 'tiny_base/*'],
    },
    entry_points={
        'console_scripts': [
            'rlhf-jax = rlhf_jax.scripts:train',
            'rlhf-jax-sample = rlhf_jax.scripts:sample',
            'rlhf-jax-export = rlhf_jax.scripts:export',
            'rlhf-jax-label = rlhf_jax.scripts:label',
            'rlhf-jax-agreement = rlhf_jax.scripts:agreement',
        ]
    },
    install_requires=[
        'absl-py',
        'array_record',
        'chex>=0.1.90',
        'flax>=0.12',
        'grain>=0.2.12',
        'importlib_resources',  # tensorflow-datasets imports it without asking for it
        'jax>=0.10',
        'jinja2',
        'matplotlib',
        'ml_collections>=1.0',
        'numpy',
        'optax>=0.2.5',
        'orbax-checkpoint>=0.11.30',
        'pyarrow',
        'rich',
        'safetensors',
        'tensorflow-datasets>=4.9.9',
        'tokenizers',
        'transformers>=5.0',
    ],
    extras_require={
        'cuda': ['jax[cuda]'],
        'tpu': ['jax[tpu]'],
        'tpu-compile': ['libtpu==0.0.42.*'],  # without TPUs; the one of jax 0.10.2
        'label': ['starlette', 'uvicorn'],
        'test': [
            'filelock',
            'httpx',
            'pytest',
            'pytest-xdist>=3.7',
            'ruff',
            'setuptools>=77',
            'starlette',
            'uvicorn',
        ],
        'parity': ['torch', 'trl==1.12.0', 'pandas', 'requests'],  # the last with PPO
        'parity-latest': ['torch', 'trl==1.16.0', 'pandas', 'requests'],
        'docs': ['mkdocs>=1.6', 'mkdocstrings[python]>=0.26', 'ruff'],
        'tensorboard': ['tensorboardX'],
        'wandb': ['wandb'],
    },
)
