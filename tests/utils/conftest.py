"""What the tests of the utilities share."""

from support.permissions import public

__all__ = ["public"]
