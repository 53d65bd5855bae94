"""Config -> what a run is made of: text tokenizer, statistics, vocabulary, sample builder, loader, model."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from worldvla.config import Config
from worldvla.data.loader import Loader, store_statistics
from worldvla.data.sample import SampleBuilder, prompt_texts
from worldvla.data.store import TokenStore
from worldvla.model.transformer import Transformer
from worldvla.tokenizers.action import Statistics, dequantize, normalize
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.tokenizers.text import TextTokenizer
from worldvla.train.metrics import ActionScale
from worldvla.vocab import NUM_BIN_CODES, Vocab, chameleon, compact


@dataclass(frozen=True)
class Pieces:
    config: Config
    image: ImageTokenizer
    text: TextTokenizer
    statistics: Statistics
    vocab: Vocab
    builder: SampleBuilder
    loader: Loader

    def digests(self) -> dict[str, str]:
        """Return what a checkpoint's ids and numbers mean, as short hashes; equal digests, equal meaning."""
        return {
            "image_tokenizer": self.image.digest(),
            "text": self.text.digest(),
            "statistics": self.statistics.digest(),
            "vocab": self.vocab.digest(),
        }


def build(config: Config) -> Pieces:
    """Open the stores and make the rest from them; the same config and stores give the same pieces.

    With train.init_from, text tokenizer and statistics are those of that checkpoint: the ids whose embeddings
    it brings keep their meaning (published code let two normalisations share the same action ids).
    """
    image = ImageTokenizer.load(config.tokenizer)
    stores = [TokenStore.open(Path(path), image.digest()) for path in config.data.stores]
    if config.train.init_from:
        source = Path(config.train.init_from)
        text = TextTokenizer.load(source / "text.json")
        statistics = Statistics.from_json(json.loads((source / "statistics.json").read_text()))
    else:
        text = _text(config, stores)
        statistics = store_statistics(stores, config.data)
    vocab = chameleon() if config.vocab == "chameleon" else compact(image.num_codes, text.size)
    builder = SampleBuilder(config.layout, vocab, text, statistics)
    loader = Loader(stores, builder, config.data, config.train.batch_size, config.train.seed)
    return Pieces(config, image, text, statistics, vocab, builder, loader)


def build_model(pieces: Pieces) -> Transformer:
    """Return the model with its initial weights, on the CPU."""
    config, vocab = pieces.config, pieces.vocab
    layout = config.layout
    model = Transformer(config.model, vocab.size, layout.num_rows, layout.num_cols, layout.action_shape)
    model.init_weights(config.train.seed)
    if config.model.codebook_init:
        codebook, bins = pieces.image.codebook().detach(), [vocab.action, vocab.state]
        model.init_codebook(codebook, vocab.image, bins, config.train.seed)
    return model


def action_scale(pieces: Pieces) -> ActionScale:
    """Return how the action codes of this run read in normalised units."""
    low, high = pieces.statistics.action_low, pieces.statistics.action_high
    centres_C = torch.from_numpy(dequantize(np.arange(NUM_BIN_CODES))).float()
    no_motion_A = torch.from_numpy(normalize(np.zeros(len(low)), low, high)).float()
    return ActionScale(centres_C, no_motion_A, pieces.config.layout.chunk)


def _text(config: Config, stores: list[TokenStore]) -> TextTokenizer:
    if config.vocab == "chameleon":
        return TextTokenizer.load(Path(config.tokenizer) / "text_tokenizer.json")
    instructions = {episode.instruction for store in stores for episode in store.episodes}
    return TextTokenizer.train(prompt_texts(config.layout, instructions), config.num_text)
