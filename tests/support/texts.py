"""Random texts, and settings for tests with many of them."""

import string

from hypothesis import settings
from hypothesis import strategies as st

quick = settings(deadline=None, max_examples=100)
ascii_text = st.text(alphabet=string.ascii_letters + string.digits + "   \n.,;:'!?-_$%<>&", max_size=60)
