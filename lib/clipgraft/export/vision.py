"""The image tower alone, for models that look at its patches, as LLaVA does.

A `CLIPVisionModel` folder where that can hold the tower, or else our own code. What LLaVA takes are the tokens behind
the last block but one, without the class token: `hidden_states[-2][:, 1:]`, [B, (image_size / patch_size)^2, width].
Those do not depend on how the model pools, so a tower that averages its patches is welcome, too; `pooler_output` of
`CLIPVisionModel` is then not what the model was trained on.
"""

from __future__ import annotations

from pathlib import Path

from clipgraft.aside import write_json
from clipgraft.checkpoint import Loaded, save_tensors
from clipgraft.export.forms import ANY, VISION_SIZES, Form, check_form
from clipgraft.export.hugging_face import vision_config, vision_state, write_image_processor

VISION_MODEL = Form(
    "transformers' CLIPVisionModel",
    vision=VISION_SIZES | {"final_ln_after_pool": ANY, "pool_type": ("avg",)},
    text={},
    logit_bias=True,
    hint="--code writes the code of the tower beside it, which needs trust_remote_code=True",
)
_BODY = """images = processor(images=picture, return_tensors="pt").pixel_values
states = tower(images, output_hidden_states=True).hidden_states
patches = states[-2][:, 1:]  # [1, NUM_PATCHES, WIDTH]
```
"""
USAGE = f"""```python
from transformers import CLIPImageProcessor, CLIPVisionModel

tower, processor = CLIPVisionModel.from_pretrained("FOLDER"), CLIPImageProcessor.from_pretrained("FOLDER")
{_BODY}"""
CODE_USAGE = f"""```python
from transformers import AutoModel, CLIPImageProcessor

tower = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()
processor = CLIPImageProcessor.from_pretrained("FOLDER")
{_BODY}"""


def write_vision_model(loaded: Loaded, out: Path) -> None:
    """Write a `CLIPVisionModel` and its image processor.

    Raises:
        ConfigError: names what it cannot hold.
    """
    config = loaded.spec["config"]
    check_form({**config, "text_cfg": {}}, VISION_MODEL)
    about = {"architectures": ["CLIPVisionModel"], "torch_dtype": "float32"}
    write_json(out / "config.json", {**about, **vision_config(config)})
    state = vision_state(loaded.model.state_dict())
    save_tensors(state, out / "model.safetensors")
    write_image_processor(loaded.spec["preprocess"], out, "CLIPImageProcessor")
