"""What tests of engine and methods share: a tiny checkpoint with tokenizer and drafter, and drafters of their own."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from weakref import finalize

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hasten.engine import ROOT, Draft, Drafter
from hasten.llm import Completion, Generation
from hasten.methods.drafters import lud
from hasten.methods.heads.chimera_weights import NAMES, ChimeraWeights, LayerWeights
from hasten.methods.heads.eagle_format import LAYER, EagleWeights, default_taps, layer_fields
from hasten.methods.heads.hidden_transfer import Transfer
from hasten.methods.heads.hydra_weights import HydraHead, HydraWeights
from hasten.methods.heads.medusa import MedusaWeights
from hasten.methods.heads.ppd import PromptTokens
from hasten.methods.systems.streams import Streams
from hasten.model.loading import read_config
from hasten.model.weights import Piece
from hasten.train.data import Batch
from hasten.train.trainer import Trainer

CONTEXT = 256
VOCABULARY = 150
START, END = 0, 1
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Killed(BaseException):
    """What a kill between two calls leaves behind, in this process: nothing is saved or tidied up."""


@contextmanager
def stopped_at(number: int, stop: Callable[[], None], error: type[BaseException]) -> Iterator[None]:
    """Before a training's step of this number `stop` is called; what stands inside ends with the error."""
    step, numbers = Trainer.step, count(1)

    def counted(self: Trainer, batches: Sequence[Batch]) -> None:
        if next(numbers) == number:
            stop()
        step(self, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        patch.setattr(Trainer, "step", counted)
        yield


def interrupted_at(number: int) -> AbstractContextManager[None]:
    """Ctrl-C arrives in a training's step of this number, and ends what stands inside."""
    return stopped_at(number, lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt)


def killed_at(number: int) -> AbstractContextManager[None]:
    """A kill ends what stands inside, in a training's step of this number."""

    def kill() -> None:
        raise Killed

    return stopped_at(number, kill, Killed)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over ASCII and the bytes of é, € and an emoji, with a few dozen merges."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = "".join(map(chr, range(32, 127))) + "\né€😀"
    alphabet = sorted(set(split.pre_tokenize_str(characters)[0][0]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    words = "the cat and the moon sing in the garden when another morning reads the stars and dances on water"
    tokenizer.train_from_iterator([words] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATE
    assert len(wrapped) == VOCABULARY
    return wrapped


def make_model(noise: float = 0.0, **settings: Any) -> LlamaForCausalLM:
    """Random weights that give varied, fairly confident predictions; `noise` makes an imperfect copy of the model."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": None,
        **settings,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager")).eval()
    weights, flaws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                continue
            scale = 1.0 if "embed" in name else (3.0 if "head" in name else 1.0) / weight.shape[1] ** 0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=weights))
            weight.add_(noise * scale * torch.randn(weight.shape, generator=flaws))
    return model


def random_model(architecture: str, **settings: Any) -> PreTrainedModel:
    """A model whose weights (biases and norms, too) are large enough for every part of it to matter."""
    config, model = CLASSES[architecture]
    if architecture == "qwen3":
        settings.setdefault("head_dim", 16)  # its default is 128
    torch.manual_seed(0)
    made: PreTrainedModel = model(config(**{**TINY, **settings}, attn_implementation="eager")).eval()
    for name, weight in made.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
        elif weight.dim() == 1:
            torch.nn.init.normal_(weight, 0.0, 0.5)
        else:
            torch.nn.init.normal_(weight, 0.0, 1.5 / weight.shape[1] ** 0.5)
    return made


def save_diffusion_checkpoint(folder: Path, attention: str, alignment: str = "same", block: int = 4) -> Path:
    """The tiny model of random weights, declared to fill masked positions; no text of the tokenizer is the mask."""
    make_model(vocab_size=VOCABULARY + 1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"] = {"attention": attention, "alignment": alignment, "mask_token_id": VOCABULARY} | (
        {} if attention == "full" else {"block_length": block}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_checkpoint(folder: Path) -> Path:
    """`folder/tiny` and, as its drafter, the noisy copy `folder/tiny-draft` with streams; returns the former."""
    for name, noise in (("tiny", 0.0), ("tiny-draft", 0.05)):
        make_model(noise).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    save_heads(folder / "tiny")
    save_streams(folder / "tiny-draft")
    return folder / "tiny"


def save_streams(folder: Path) -> None:
    """Beside a drafter of `make_model`, streams that know nothing."""
    Streams(Near()(torch.zeros(2, 48)), 1).save(folder)


def save_heads(folder: Path) -> None:
    """Beside a checkpoint, heads that say what the target says, more or less."""
    model = LlamaForCausalLM.from_pretrained(folder)
    weight = model.lm_head.weight.detach()
    save_medusa(folder / "heads" / "medusa", weight)
    carries, prefix = fitted_carries(model), prefix_layer(model.config)
    with torch.no_grad():
        # Its output is near what it reads.
        for each in (prefix.layers[0].self_attn.o_proj, prefix.layers[0].mlp.down_proj):
            each.weight.mul_(0.02)
    save_hydra(folder / "heads" / "hydra", weight, carries=carries)
    save_hydra(folder / "heads" / "hydra-prefix", weight, carries=carries, prefix=prefix)
    save_ppd(folder / "heads" / "ppd", weight.shape[1])
    save_hidden_transfer(folder / "heads" / "hidden-transfer", weight.shape[1])
    save_chimera(folder / "heads" / "chimera", model)
    save_eagle(folder)
    save_lud(folder, weight.shape[1])


ACCURACY = ((0.6, 0.2, 0.1), (0.4, 0.2, 0.1), (0.3, 0.1, 0.1))
"""Of the three heads that are made here, as their configurations tell it."""


class Near:
    """Tensors with some noise, the same each time."""

    def __init__(self, seed: int = 5) -> None:
        self.noise = torch.Generator().manual_seed(seed)

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor + 0.1 * torch.randn(tensor.shape, generator=self.noise)


def save_medusa(folder: Path, weight: Tensor) -> None:
    """Heads near a target's own, [words, hidden]."""
    near, hidden = Near(), weight.shape[1]
    blocks = [[Piece(near(torch.zeros(hidden, hidden)), near(torch.zeros(hidden)))] for _ in range(3)]
    MedusaWeights(blocks, [Piece(near(weight)) for _ in range(3)], accuracy=ACCURACY).save(folder, {})


def save_hydra(
    folder: Path,
    weight: Tensor,
    layers: int = 1,
    shared: bool = False,
    carries: Sequence[Tensor] = (),
    prefix: LlamaModel | None = None,
) -> HydraWeights:
    """The same as heads that see the tokens before them; `carries` [hidden, (k + 2) * hidden] make states of these."""
    near, (words, hidden) = Near(), weight.shape
    carries = carries or [torch.eye(hidden, (k + 2) * hidden) for k in range(3)]
    heads = [
        HydraHead(
            Piece(0.1 * near(torch.zeros(carry.shape)), near(torch.zeros(hidden))),
            Piece(carry, near(torch.zeros(hidden))),
            Piece(near(torch.zeros(hidden, hidden)), near(torch.zeros(hidden))) if layers > 1 else None,
        )
        for carry in carries
    ]
    outputs = [Piece(near(weight), near(torch.zeros(words))) for _ in range(1 if shared else 3)]
    own = {} if prefix is None else prefix.state_dict()
    tensors = {name: Piece(tensor) for name, tensor in own.items() if name != "embed_tokens.weight"}
    made = HydraWeights(heads, outputs, layers, accuracy=ACCURACY, prefix=tensors)
    made.save(folder, {})
    return made


def prefix_layer(config: LlamaConfig) -> LlamaModel:
    """A layer of random weights, as transformers has it, with the heads and widths of a model."""
    torch.manual_seed(3)
    changed = {"num_hidden_layers": 1, "initializer_range": 0.2, "attn_implementation": "eager"}
    return LlamaModel(LlamaConfig(**{**config.to_dict(), **changed})).eval()


@torch.inference_mode()
def fitted_carries(model: LlamaForCausalLM) -> list[Tensor]:
    """Of three heads, the matrices of least squares from a state and the tokens behind it to the state of the last."""
    texts = torch.randint(2, VOCABULARY, (48, 40), generator=torch.Generator().manual_seed(7))
    states, embedded = model.model(texts).last_hidden_state, model.model.embed_tokens(texts)
    carries = []
    for k in range(3):
        end = texts.shape[1] - k - 1
        seen = [states[:, :end], *(embedded[:, j : end + j] for j in range(1, k + 2))]
        given = torch.cat(seen, -1).flatten(0, 1)
        carries.append(torch.linalg.lstsq(given, states[:, k + 1 :].flatten(0, 1)).solution.T.contiguous())
    return carries


def save_ppd(folder: Path, hidden: int) -> None:
    """Prompt tokens that were never trained."""
    vectors = torch.randn(3, 1, hidden, generator=torch.Generator().manual_seed(5))
    PromptTokens(vectors, accuracy=ACCURACY).save(folder, {})


def save_lud(folder: Path, hidden: int) -> None:
    """Three placeholders that were never trained."""
    vector = torch.randn(hidden, generator=torch.Generator().manual_seed(5))
    lud.save_placeholder(vector, 3, folder / lud.FILE)


@torch.inference_mode()
def save_chimera(
    folder: Path, model: LlamaForCausalLM, words: Tensor | None = None, wide: bool = False
) -> ChimeraWeights:
    """Trigrams that make states by least squares, a layer that adds little to them, and heads that add little again.

    Args:
        words: that they may say.
        wide: whether heads are the authors', [words, 2 hidden].
    """
    texts = torch.randint(2, VOCABULARY, (48, 40), generator=torch.Generator().manual_seed(7))
    states, embedded = model.model(texts).last_hidden_state, model.model.embed_tokens(texts)
    given = torch.cat([embedded[:, :-2], embedded[:, 1:-1], embedded[:, 2:]], -1).flatten(0, 1)
    out = torch.linalg.lstsq(given, states[:, 2:].flatten(0, 1)).solution.T.contiguous()
    near, hidden, weight = Near(), model.config.hidden_size, model.lm_head.weight.detach()
    layer = {
        part: Piece(0.3 * near(tensor) if tensor.dim() > 1 else near(tensor))
        for part, name in NAMES.items()
        for tensor in [model.model.layers[0].get_parameter(f"{name}.weight").detach()]
    }
    said = weight if words is None else weight[words]
    heads = [
        near(torch.cat([torch.zeros_like(said), said], 1) if wide else torch.zeros(hidden, hidden)) for _ in range(3)
    ]
    mix = Piece(0.1 * near(torch.zeros(3 * hidden, 3 * hidden)), near(torch.zeros(3 * hidden)))
    head = None if words is None or wide else Piece(near(said))
    made = ChimeraWeights(mix, Piece(out), LayerWeights(**layer), [*map(Piece, heads)], None, head, words, ACCURACY)
    made.save(folder, {})
    return made


def save_eagle(folder: Path) -> None:
    """Beside a checkpoint whose norms are ones, heads whose layer is the target's first, more or less: of both kinds.

    That of EAGLE-3, `eagle-3`, reads next to nothing but the token.
    """
    target, config = LlamaForCausalLM.from_pretrained(folder).state_dict(), read_config(folder)
    noise, hidden = torch.Generator().manual_seed(6), config.hidden_size
    layer = {piece: target[f"model.layers.0.{name}"] for piece, name in LAYER.items()}
    near = {piece: Piece(each + 0.05 * torch.randn(each.shape, generator=noise)) for piece, each in layer.items()}
    # A row enters as the token's embedding, whatever the state before it.
    fusion = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], 1)
    made = EagleWeights(1, config, Piece(fusion), near, None, None, None, None)
    made.save(folder / "heads" / "eagle", layer_fields(config))
    layer |= {
        piece: torch.cat([layer[piece], torch.zeros_like(layer[piece])], 1) for piece in ("query", "key", "value")
    }
    layer |= {norm: torch.ones(hidden) for norm in ("token_norm", "mixer_norm")}
    taps = default_taps(len(config.layers))
    fusion = 0.02 * torch.randn(hidden, len(taps) * hidden, generator=noise)
    pieces = {name: Piece(weight) for name, weight in layer.items()}
    made = EagleWeights(3, config, Piece(fusion), pieces, Piece(torch.ones(hidden)), None, None, None, taps)
    made.save(folder / "heads" / "eagle-3", layer_fields(config))


def save_hidden_transfer(folder: Path, hidden: int) -> None:
    """Maps that leave a state nearly as it is."""
    near = Near()
    Transfer(torch.stack([near(torch.eye(hidden)) for _ in range(3)]), 1, ACCURACY).save(folder, {})


def apart(got: Tensor, expected: Tensor) -> float:
    """The size of the difference over that of what is expected: float32's rounding leaves some millionths."""
    return float((got - expected).norm() / expected.norm())


class Scripted(Drafter):
    """Proposes what a function of the request says, and keeps what it is shown."""

    def __init__(self, script: Callable[[Any], Draft]) -> None:
        self.script = script
        self.began: list[int] = []
        self.ended: list[int] = []
        self.seen: dict[int, list[Any]] = {}
        self.read: dict[int, list[int]] = {}

    def begin(self, request: Any) -> None:
        self.began.append(request.id)

    def propose(self, request: Any, budget: int) -> Draft:
        return self.script(request)

    def observe_prompt(self, request: Any, start: int, taps: Any) -> None:
        self.read.setdefault(request.id, []).append(start)

    def observe(self, request: Any, seen: Any) -> None:
        self.seen.setdefault(request.id, []).append(seen)

    def end(self, request: Any) -> None:
        self.ended.append(request.id)


class Replay(Drafter):
    """Knows plain decoding's answers: proposes the next `length` tokens, and `beyond` behind the end of an answer."""

    def __init__(self, known: Iterable[Generation], length: int = 8, beyond: Sequence[int] = ()) -> None:
        self.answers = {tuple(each.prompt_token_ids): [choice.token_ids for choice in each.choices] for each in known}
        self.length, self.beyond = length, list(beyond)

    def rest(self, request: Any) -> list[int]:
        """What plain decoding goes on with."""
        answer = self.answers[tuple(request.tokens[: request.prompt_length])][request.choice]
        return answer[len(request.output) :] + self.beyond

    def propose(self, request: Any, budget: int) -> Draft:
        return Draft.chain(self.rest(request)[: self.length])


class Bushy(Replay):
    """The answer is the last child of every node; the siblings before it are wrong, and have a child each."""

    width = 3

    def propose(self, request: Any, budget: int) -> Draft:
        draft, parent = Draft(), ROOT
        for level, token in enumerate(self.rest(request)[: self.length]):
            for sibling in range(1, self.width):
                wrong = (token + sibling * (level + 2)) % VOCABULARY
                add(draft, wrong if wrong != token else (token + 1) % VOCABULARY, parent)
                add(draft, token, len(draft) - 1)
            parent = add(draft, token, parent)
        return draft


def add(draft: Draft, token: int, parent: int) -> int:
    """Append a node and return its number."""
    draft.tokens.append(token)
    draft.parents.append(parent)
    return len(draft) - 1


def check_statistics(completion: Completion) -> None:
    """Whatever was proposed, the figures of a request add up."""
    figures, tokens = completion.statistics, len(completion.token_ids)
    assert 0 <= figures.accepted <= figures.proposed
    assert figures.tokens == tokens
    assert figures.steps == completion.steps == len(figures.accepted_per_step)
    assert sum(figures.accepted_per_step) == figures.accepted
    # Every step adds the target's own token, but the last, where stopping may have cut it off.
    assert figures.accepted + figures.steps - 1 <= tokens <= figures.accepted + figures.steps
    # Probes are rows, too.
    assert figures.rows >= figures.steps + figures.proposed
    assert completion.tokens_per_step >= 1


def same(got: Completion, expected: Completion) -> None:
    """Token for token the same completion, as certain of each."""
    assert got.token_ids == expected.token_ids
    assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason)
    assert len(got.logprobs) == len(expected.logprobs)
    for one, other in zip(got.logprobs, expected.logprobs, strict=True):
        assert one.token == other.token
        assert abs(one.logprob - other.logprob) <= 1e-4
        assert len(one.top) == len(other.top)
        for (_, mine), (_, theirs) in zip(one.top, other.top, strict=True):
            assert abs(mine - theirs) <= 1e-4
    check_statistics(got)


class PeakBytes(TorchDispatchMode):
    """Meanwhile, the most bytes (`most`) that tensors which are made hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        leaves = tree_leaves((arguments, options))
        # Packed weights have no storage that can be looked at.
        tensors = [each for each in leaves if isinstance(each, Tensor) and not each.is_mkldnn]
        given = {each.untyped_storage().data_ptr() for each in tensors}
        result = operation(*arguments, **(options or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._made(each.untyped_storage(), given)
        return result

    def _made(self, storage: Any, given: set[int]) -> None:
        place = storage.data_ptr()
        if not place or place in self._known or place in given:
            return
        self._known[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        finalize(storage, self._gone, place)

    def _gone(self, place: int) -> None:
        self.now -= self._known.pop(place)
