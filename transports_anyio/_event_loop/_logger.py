"""Where the event loop logs: to the same logger as asyncio's own event loops."""

import logging

logger = logging.getLogger("asyncio")
