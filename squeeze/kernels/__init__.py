"""Ops with a readable reference and a Triton kernel each: `<op>/{api,reference,triton}.py`."""
