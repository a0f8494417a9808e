"""The logger of the event loop, which is that of asyncio's own event loops."""

import logging

logger = logging.getLogger("asyncio")
