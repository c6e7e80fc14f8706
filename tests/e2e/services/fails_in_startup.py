import os
import time

import snowdrop as sd


@sd.service(park_s_max=0.0, scale=sd.Scale(max=1))
class Raises:
    @sd.startup
    def load(self) -> None:
        raise OSError("no such accelerator")

    @sd.endpoint("/x")
    async def x(self) -> int:
        return 1


@sd.service(park_s_max=0.0, scale=sd.Scale(max=1), startup_s_max=0.5)
class Never:
    @sd.startup
    def load(self) -> None:
        time.sleep(3600)

    @sd.endpoint("/x")
    async def x(self) -> int:
        return 1


@sd.service(park_s_max=0.0, scale=sd.Scale(max=1))
class Exits:
    @sd.startup
    def load(self) -> None:
        os._exit(9)

    @sd.endpoint("/x")
    async def x(self) -> int:
        return 1
