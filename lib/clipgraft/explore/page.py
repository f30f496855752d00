"""The page: two tabs, `by words` and `by picture`, over one choice of model and data set.

Bound to 127.0.0.1, and nothing on it comes from anywhere else: Gradio's own scripts and fonts are in its package, its
questions for newer versions and its statistics are off, and so is its history of what was asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import gradio as gr
from PIL import Image
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from clipgraft.config import ConfigError
from clipgraft.data.images import BadImage, decode
from clipgraft.explore.explorer import Explorer
from clipgraft.explore.finished import Classes
from clipgraft.explore.show import CSS, show_captions, show_classes, show_patches, show_words

HOST = "127.0.0.1"
HOSTS = [HOST, "localhost"]  # what a browser may call this machine, through a tunnel as well
MAX_UPLOAD = 64 * 2**20  # bytes
THUMBNAIL = 256  # pixels of the longer side
NUM_CAPTIONS = 8
NUM_LABELS = 4  # asked for unless told
TEMPLATE = "a photo of a {c}"


class _Words(NamedTuple):
    """What stands on the tab `by words`."""

    query: gr.Textbox
    num: gr.Slider
    find: gr.Button
    found: gr.Gallery
    choices: gr.HTML


class _Picture(NamedTuple):
    """What stands on the tab `by picture`."""

    file: gr.Image
    labels: gr.Dropdown
    own: gr.Textbox
    template: gr.Textbox
    classes: gr.HTML
    captions: gr.HTML
    choices: gr.HTML


def build_page(explorer: Explorer) -> gr.Blocks:
    """The page of a run, not yet served."""
    run = explorer.run
    models, indexes = list(run.models), list(run.indexes)
    with gr.Blocks(analytics_enabled=False, title=f"{run.name}: explore") as page:
        gr.Markdown(f"## {run.name}")
        with gr.Row():
            model = gr.Radio(models, value=_preferred(models), label="model", elem_id="model")
            data = gr.Dropdown(indexes, value=indexes[0], label="data set", elem_id="data")
        about = gr.Markdown(elem_id="about")
        with gr.Tabs() as tabs:
            with gr.Tab("by words", id="words"):
                words = _words_tab()
            with gr.Tab("by picture", id="picture"):
                picture = _picture_tab(list(run.classes))
        changes = [model.change, data.change]
        gr.on([page.load, *changes], _told(explorer.about), [model, data], about)
        rows = _answer_words(explorer, words, model, data)
        _answer_picture(explorer, picture, model, data)
        words.found.select(_told(_taker(explorer)), rows, [picture.file, tabs])
    return cast(gr.Blocks, page)


def _words_tab() -> _Words:
    with gr.Row():
        query = gr.Textbox("", label="query", placeholder="what is on it?", elem_id="query")
        num = gr.Slider(4, 48, value=12, step=4, label="pictures")
    find = gr.Button("search", variant="primary", elem_id="search")
    gr.Markdown("### Nearest pictures, with cosines; click one to look at it")
    found = gr.Gallery(
        show_label=False,
        allow_preview=False,
        interactive=False,
        buttons=[],
        object_fit="contain",
        elem_id="found",
    )
    gr.Markdown("### Which expert each word went to, first choice")
    return _Words(query, num, find, found, gr.HTML(elem_id="words_choices"))


def _picture_tab(labels: list[str]) -> _Picture:
    with gr.Row():
        with gr.Column():
            file = gr.Image(
                label="drop a picture, or click one that a query has found",
                sources=["upload", "clipboard"],
                format="png",
                buttons=[],
                height=320,
                elem_id="picture",
            )
            # Its file is decoded as all others are, with the same messages. (A subclass would make Gradio write a .pyi.)
            uploads = Path(file.GRADIO_CACHE)
            file.preprocess = functools.partial(_file_of, uploads)  # type: ignore[method-assign,assignment]
            some = labels[:NUM_LABELS]  # each costs its prompts, once
            asked = gr.Dropdown(labels, value=some, multiselect=True, label="labels")
            own = gr.Textbox("", label="own classes, with commas between", elem_id="own_classes")
            template = gr.Textbox(TEMPLATE, label="their prompt", elem_id="template")
        with gr.Column():
            classes, captions = gr.HTML(elem_id="classes"), gr.HTML(elem_id="captions")
    gr.Markdown("### Which expert each patch went to, first choice")
    choices = gr.HTML(elem_id="patches")
    return _Picture(file, asked, own, template, classes, captions, choices)


def _answer_words(
    explorer: Explorer, words: _Words, model: gr.Radio, data: gr.Dropdown
) -> gr.State:
    """Searches when asked, and again when the model or the data set changes; what was found, by data set and row."""
    rows = gr.State([])
    given, shown = [model, data, words.query, words.num], [words.found, rows, words.choices]
    search, again = (
        _told(functools.partial(answer, explorer)) for answer in (_search, _search_again)
    )
    gr.on([words.query.submit, words.find.click], search, given, shown)
    gr.on([model.change, data.change], again, given, shown)
    return rows


def _answer_picture(
    explorer: Explorer, picture: _Picture, model: gr.Radio, data: gr.Dropdown
) -> None:
    """Looks whenever anything changes that the answer depends on."""
    asked = [picture.labels.change, picture.own.submit, picture.template.submit]
    gr.on(
        [picture.file.change, model.change, data.change, *asked],
        _told(functools.partial(_look, explorer)),
        [model, data, picture.file, picture.labels, picture.own, picture.template],
        [picture.captions, picture.classes, picture.choices],
    )


def serve(page: gr.Blocks, port: int | None) -> str:
    """Serve the page on this machine alone, in a thread of its own; returns its address."""
    fonts = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    theme = gr.themes.Default(font=fonts[0], font_mono=fonts[1])
    _, address, _ = page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=CSS,
        max_file_size=MAX_UPLOAD,
        app_kwargs={
            "middleware": [
                # A page elsewhere that has its own name lead to this machine would be let in as if it were this page,
                Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS),
                # and any page that is open in the same browser may send what it likes, if not read the answer.
                Middleware(_OwnPages),
            ]
        },
    )
    return address


class _OwnPages:
    """Lets in what a page of this machine asks for, or no page at all."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is None or urlsplit(origin).hostname in HOSTS:
            await self.app(scope, receive, send)
        else:
            refusal = PlainTextResponse("asked for by another page", status_code=403)
            await refusal(scope, receive, send)


def _preferred(models: Sequence[str]) -> str:
    """What a run is made for, or else its last model."""
    return "moe" if "moe" in models else models[-1]


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """A mistake of the user becomes a message on the page; any other error also goes to the terminal."""

    @functools.wraps(function)
    def answer(*given: Any) -> Any:
        try:
            return function(*given)
        except ConfigError as error:
            raise gr.Error(escape(str(error)), duration=None, print_exception=False) from None

    return answer


def _file_of(uploads: Path, payload: Any) -> Path | None:
    """Where Gradio has put a picture; whoever asks may name any other file of this machine."""
    if payload is None or payload.path is None:
        return None
    path = Path(payload.path).resolve()
    if not path.is_relative_to(uploads.resolve()):
        raise gr.Error("this picture was not uploaded here", print_exception=False)
    return path


def _search(explorer: Explorer, model: str, data: str, query: str, num: int) -> tuple[Any, ...]:
    answer = explorer.search(model, data, query, int(num))
    samples = explorer.samples(data)
    pictures = []
    for each in answer.found:
        image = samples.image(each.row)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        pictures.append((image, f"{each.score:.3f}  {' / '.join(each.captions)}"))
    rows = [(data, each.row) for each in answer.found]
    return pictures, rows, show_words(answer.words, answer.choices, model)


def _search_again(
    explorer: Explorer, model: str, data: str, query: str, num: int
) -> tuple[Any, ...]:
    """The same query to another model or data set, if there was one."""
    return _search(explorer, model, data, query, num) if query.strip() else ([], [], "")


def _taker(explorer: Explorer) -> Callable[..., Any]:
    """What a click on a found picture does."""

    def take(rows: list[tuple[str, int]], event: gr.SelectData) -> tuple[Image.Image, Any]:
        data, row = rows[event.index]
        return explorer.samples(data).image(row), gr.Tabs(selected="picture")

    return take


def _look(
    explorer: Explorer,
    model: str,
    data: str,
    picture: Path | None,
    labels: list[str],
    own: str,
    template: str,
) -> tuple[str, str, str]:
    if picture is None:
        return "", "", ""
    names = [name.strip() for name in own.split(",") if name.strip()]
    classes = Classes(names, [template]) if names else None
    try:
        pixels = decode(picture.read_bytes())
        answer = explorer.look(model, data, pixels, NUM_CAPTIONS, labels, classes)
    except BadImage as error:  # in place of the answers, which would be those of another picture
        return "", f"<p role='alert'>This picture cannot be read: {escape(str(error))}</p>", ""
    return (
        show_captions(answer.captions),
        show_classes(answer.classes),
        show_patches(answer.square_HW3, answer.grid, answer.choices, model),
    )
