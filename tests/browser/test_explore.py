"""Laws of the explore page in a real browser, served by the real command on a run with random weights."""

import signal

import pytest
from explore_server import START, Server
from PIL import Image
from tiny_run import make_run

PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def server(chromium, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    make_run(folder / "results")
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture
def tab(browser, server):
    """The page, ready to be asked; afterwards it must have complained of nothing and asked nobody else."""
    tab = browser.open(server.address)
    wait_for_model(tab.page, "moe: 3 experts, top 2")
    yield tab
    # Gradio's own remark on every upload.
    assert [each for each in tab.errors if each != "Method not implemented."] == []
    assert [each for each in tab.requests if not each.startswith(server.address)] == []
    assert "Traceback" not in server.log.read_text()


def wait_for_model(page, words):
    page.set_default_timeout(START * 1000)
    about = "words => document.querySelector('#about')?.innerText.includes(words)"
    page.wait_for_function(about, arg=words)


def turn_to(page, tab):
    page.get_by_role("tab", name=tab).click()


def ask(page, query):
    page.fill("#query textarea, #query input", query)
    page.click("#search")


def test_a_query_finds_pictures_and_a_click_tells_what_is_on_one(tab):
    page = tab.page
    ask(page, "a small red star")
    page.wait_for_selector("#found img")
    captions = page.locator("#found .caption-label").all_inner_texts()
    scores = [float(caption.split()[0]) for caption in captions]
    assert len(scores) == 12 and scores == sorted(scores, reverse=True)
    widths = "() => [...document.querySelectorAll('#found img')].map(each => each.naturalWidth)"
    page.wait_for_function(f"({widths})().every(width => width == 32)")
    page.wait_for_selector("#words_choices td")
    assert page.locator("#words_choices th").all_inner_texts()[1:5] == ["a", "small", "red", "star"]

    page.locator("#found .thumbnail-item").nth(3).click()
    page.wait_for_selector("#patches rect")
    assert page.locator("#patches .maps svg").count() == 3  # the picture and two layers
    assert page.locator("#patches rect").count() == 2 * 16
    clicked = captions[3].split(maxsplit=1)[1].split(" / ")
    assert page.locator("#captions .bars span").count() == 8 and all(clicked)
    assert page.locator("#classes h3").all_inner_texts() == ["colour"]
    page.fill("#own_classes textarea, #own_classes input", "star, heart")
    page.press("#own_classes textarea, #own_classes input", "Enter")
    page.wait_for_selector("#classes h3:has-text('own classes')")
    assert {"star", "heart"} <= set(page.locator("#classes span").all_inner_texts())

    page.check("#model input[value=base]")
    page.wait_for_selector("#patches:has-text('No experts in the image tower of base')")
    wait_for_model(page, "base: dense")
    assert page.locator("#patches rect").count() == 0
    turn_to(page, "by words")
    page.wait_for_selector("#words_choices:has-text('No experts in the text tower of base')")
    page.check("#model input[value=expert_1]")
    wait_for_model(page, "expert_1: dense")
    page.wait_for_selector("#words_choices:has-text('No experts in the text tower of expert_1')")


def test_a_dropped_file_is_looked_at_and_a_broken_one_is_named(tab, tmp_path):
    page = tab.page
    turn_to(page, "by picture")
    Image.new("RGB", (90, 50), "red").save(tmp_path / "red.jpg")
    page.set_input_files("#picture input[type=file]", tmp_path / "red.jpg")
    page.wait_for_selector("#patches rect")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "red.jpg").read_bytes()[:200])
    page.set_input_files("#picture input[type=file]", tmp_path / "broken.jpg")
    page.wait_for_selector("#classes:has-text('This picture cannot be read: truncated')")
    page.wait_for_function("document.querySelector('#patches').innerText.trim() === ''")


def test_on_a_phone_in_the_dark_it_fits_and_can_be_read(browser, server, tab):
    page = browser.open(server.address, PHONE, "dark").page
    wait_for_model(page, "moe: 3 experts")
    ask(page, "a blue heart")
    page.wait_for_selector("#words_choices td")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    light = "e => getComputedStyle(e).color.match(/[0-9.]+/g).slice(0, 3).map(Number)"
    for name in ("#about", "#words_choices th:nth-child(2)", "#found .caption-label"):
        assert min(page.eval_on_selector(name, light)) > 130, name
    turn_to(page, "by picture")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_an_empty_query_is_told_on_the_page(tab):
    ask(tab.page, "  ")
    tab.page.wait_for_selector("text=the query is empty")


def test_only_this_machine_can_reach_it(server):
    assert server.listening() == [f"0100007F:{server.port:04X}"]


def test_interrupting_ends_it_and_leaves_nothing_behind(server):
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    assert "closed" in server.log.read_text()
    assert list(server.temporary.glob("clipgraft-explore-*")) == []
