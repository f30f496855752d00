"""Reductions as a config has them: a name, or a mapping."""

from pydantic import TypeAdapter

from clipgraft.reductions import ImageReduction, TextReduction

image_reduction = TypeAdapter(ImageReduction).validate_python
text_reduction = TypeAdapter(TextReduction).validate_python
