import snowdrop as sd


@sd.service(park_s_max=0.0, scale=sd.Scale(max=1))
class Broken:
    @sd.endpoint("/x")
    async def x(self) -> int:
        return 1


# Describing the service must work (it runs on the client), serving it must not.
if __file__.startswith("/app/"):
    raise RuntimeError("the import is broken on purpose")
