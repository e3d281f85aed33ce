# SPDX-License-Identifier: Apache-2.0
"""vlmkernels inside other libraries, each of which is imported where its function is called and not before."""

__all__ = ["register_attention"]


def register_attention() -> None:
    """Make ``"vlmkernels"`` an attention implementation of Hugging Face transformers, with its own masks.

    Then ``model.set_attn_implementation("vlmkernels")``, or ``attn_implementation="vlmkernels"`` in ``from_pretrained``. Masks
    reach the kernels as ``KeyRanges`` and are never tensors of ``Sq x Skv``. A second name, ``"vlmkernels_flash"``, does the
    same; the vision towers of Qwen hand over all their images in one call where the name has "flash" in it. Calling it again
    changes nothing.

    Raises:
        ImportError: transformers isn't installed, or is older than 5.17.
    """
    from vlmkernels.integrations import transformers_attention

    transformers_attention.register()
