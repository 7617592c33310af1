"""A model, or a run that is merged on the way, as a GGUF file for llama.cpp, Ollama and LM Studio."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from litpeft.core.folders import atomic_folder, locked, refuse_existing
from litpeft.core.place import check_place
from litpeft.core.safetensors import RESULT_DTYPES
from litpeft.core.terminal import say
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.compare import PROMPTS, check, in_float32, logits_of
from litpeft.exchange.gguf.files import MODEL, OF_DTYPE, GgufFolder
from litpeft.exchange.gguf.layout import Layout
from litpeft.exchange.merge import NOT_CHECKED, main_dtype, merge
from litpeft.exchange.push import check_repo, push, write_card
from litpeft.exchange.run import find_run, tell_outdated, tell_progress
from litpeft.exchange.settings import Convert, Merge
from litpeft.model.build import build, checked_files, read_finite


def export(settings: Convert) -> None:
    """Writes the file and a Modelfile."""
    source = Path(settings.source)
    out = Path(settings.out) if settings.out else source / settings.to
    run = find_run(source)
    if run is not None and not run.is_model:
        given = {key: getattr(settings, key) for key in ("base", "type", "dtype", "no_verify", "push", "overwrite")}
        return merge(Merge(settings.source, str(out), to="gguf", **given))
    check_place(out)
    check_repo(settings.push)
    refuse_existing(out, settings.overwrite)
    if run is not None:
        tell_progress(run)
    folder = source if run is None else run.model_folder()
    if run is None:
        tell_outdated(folder)
        tokenizer = Tokenizer.load(folder)
        template = ChatTemplate(tokenizer, is_setting=False)
    else:
        tokenizer, template = run.tokenizer_and_template(folder)
    dtype = RESULT_DTYPES.get(settings.dtype) or main_dtype(folder)
    config, weights, names = checked_files(folder)
    tokenizer.check_vocabulary(config.vocab_size)
    layout = Layout(names)
    with locked(out), atomic_folder(out, settings.overwrite) as temporary:
        type_, system = settings.type or OF_DTYPE[dtype], run.system if run else None
        chats = run is not None or template.name == "model"
        files = GgufFolder(temporary, layout, type_, tokenizer, template, system, str(source), chats)

        def rows() -> Iterator[tuple[str, Tensor]]:
            for ours in names.ours:
                tensor = read_finite(names, weights, ours)
                yield ours, files.encoder(ours, tensor)
                weights.drop_pages(tensor.nbytes)

        files.write(rows())
        if settings.push:
            write_card(temporary, settings.push, source, run, f"A GGUF file ({type_})")
        prompts = [tokenizer.encode(text) for text in PROMPTS]
        if settings.no_verify:
            say(f"{NOT_CHECKED} the file's header, tokenizer and logits")
        else:
            want = logits_of(in_float32(build(folder, dtype)), prompts)
            say(f"logits at {len(want)} positions of {len(prompts)} prompts (largest {float(want.abs().max()):.1f}):")
            hint = "take a type with more bits"
            check(want, files.logits(prompts), files.tolerance, f"file read back, {type_}", source, hint)
    say(f"wrote {out / MODEL}; next: llama.cpp, LM Studio, or ollama create NAME -f {out / 'Modelfile'}")
    if settings.push:
        push(out, settings.push)
