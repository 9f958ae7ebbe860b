"""The worlds of ViZDoom and a random player in them: a clip's frames from its class and seed.

The player holds random actions for random stretches and pauses between them, so that one clip has static, slow and busy
parts. Each episode runs in an engine of its own, started fresh, and depends on nothing but what it is asked for.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation

TICS_PER_SECOND = 35  # The Doom engine's clock.
POLICY_VERSION = 1  # Part of the recipe: raise it whenever the same seed would give another clip.
MAX_ATTEMPTS = 200  # Episodes to try for one clip: one has to last until the clip's last frame.


@dataclass(frozen=True)
class World:
    """One class: a configuration file of ViZDoom and, for a whole game, the map in it."""

    config: str
    map: str = ""


_SCENARIOS = """basic deadly_corridor deathmatch defend_the_center defend_the_line health_gathering
    health_gathering_supreme my_way_home predict_position rocket_basic take_cover"""
WORLDS: dict[str, World] = {
    **{name: World(name) for name in _SCENARIOS.split()},
    **{f"freedoom1_{name.lower()}": World("freedoom1", name) for name in ("E1M1", "E2M3", "E3M5")},
    **{f"freedoom2_{name.lower()}": World("freedoom2", name) for name in ("MAP01", "MAP07", "MAP12", "MAP20", "MAP29")},
}


@dataclass(frozen=True)
class Recipe:
    """Everything besides class and seed that decides what a clip looks like."""

    vizdoom: str
    policy: int
    frames: int
    frame_skip: int
    width: int
    height: int
    short_side: int

    @property
    def fps(self) -> Fraction:
        return Fraction(TICS_PER_SECOND, self.frame_skip)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the clips in pixels, even as 4:2:0 chroma needs."""
        scale = self.short_side / min(self.width, self.height) if self.short_side else 1.0
        return round(self.height * scale / 2) * 2, round(self.width * scale / 2) * 2


class EpisodeError(ValueError):
    """No episode of a clip's seed lasted for the whole clip."""


# Kind of stretch: fewest and most frames that it is held. Standing is longest, for it begins with coming to a halt. One
# stretch of each kind takes at most 64 frames.
STRETCHES = {"stand": (12, 20), "creep": (6, 12), "turn": (6, 10), "walk": (8, 12), "fight": (6, 10)}


TURNS = {"creep": (0.3, 0.9), "turn": (3.0, 7.0)}  # Slowest and fastest turn in degrees a tic.
WARM_UP = (20, 70)  # Fewest and most tics before the first frame.
FREEDOOM = "0.13.0"  # Whose art and maps are in the wheel of ViZDoom; its files say so.


# Forward and sideward push (the engine's units: 25 walks, 50 runs), turn to the right in degrees a tic, attack 0 or 1.
Action = tuple[float, float, float, float]
IDLE: Action = (0.0, 0.0, 0.0, 0.0)
# What a push of 1 adds to the speed in a tic, in map units (2048 / 65536, the engine's ORIG_FRICTION_FACTOR).
SPEED_PER_PUSH = 1 / 32


def draw_action(kind: str, rng: np.random.Generator) -> Action:
    """The action held for one stretch of the given kind."""
    side = float(rng.choice((-1.0, 1.0)))
    if kind == "stand":
        return IDLE
    if kind == "creep":  # A slow pan while hardly moving: about a pixel a frame at 160 pixels for 90 degrees.
        return rng.uniform(0.0, 8.0), 0.0, side * rng.uniform(*TURNS["creep"]), 0.0
    if kind == "turn":  # The keyboard turns by 3.5 degrees a tic, and by 7 running.
        return 0.0, 0.0, side * rng.uniform(*TURNS["turn"]), 0.0
    if kind == "walk":
        return float(rng.choice((25.0, 50.0, 50.0, -25.0))), 0.0, side * rng.uniform(0.0, 1.5), 0.0
    return rng.uniform(-15.0, 25.0), side * rng.uniform(10.0, 40.0), rng.uniform(-2.0, 2.0), 1.0  # fight


def draw_actions(frames: int, rng: np.random.Generator) -> Iterator[Action]:
    """`frames` actions in held stretches. Every kind comes once, in random order, before any comes again."""
    made = 0
    while made < frames:
        for kind in rng.permutation(sorted(STRETCHES)):
            low, high = STRETCHES[kind]
            held, action = int(rng.integers(low, high + 1)), draw_action(kind, rng)
            for _ in range(min(held, frames - made)):
                yield action
            made += min(held, frames - made)


@contextmanager
def running_game(world: World, recipe: Recipe, seed: int, scratch: Path):
    """A fresh engine in the first tic of an episode: no window, no sound, no status bar, its files in `scratch`."""
    import vizdoom

    resolution = getattr(vizdoom.ScreenResolution, f"RES_{recipe.width}X{recipe.height}")
    package = Path(vizdoom.__file__).parent
    button = vizdoom.Button
    game = vizdoom.DoomGame()
    game.load_config(str(package / "scenarios" / f"{world.config}.cfg"))
    # Named outright: ViZDoom would otherwise prefer a commercial doom2.wad that lies beside it.
    game.set_doom_game_path(str(package / ("freedoom1.wad" if world.config == "freedoom1" else "freedoom2.wad")))
    if world.map:
        game.set_doom_map(world.map)
    settings = scratch / "engine.ini"
    settings.unlink(missing_ok=True)  # The engine writes its settings back: no clip may inherit another one's.
    game.set_doom_config_path(str(settings))
    game.set_mode(vizdoom.Mode.PLAYER)  # Synchronous: the game waits for each action.
    game.set_window_visible(False)
    game.set_console_enabled(False)
    game.set_sound_enabled(False)
    game.set_audio_buffer_enabled(False)
    game.set_automap_buffer_enabled(False)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_screen_resolution(resolution)
    game.set_render_hud(False)
    game.set_render_messages(False)
    game.set_render_screen_flashes(False)
    game.set_objects_info_enabled(bool(world.map))
    game.set_depth_buffer_enabled(bool(world.map))
    # The same controls everywhere, whatever the scenario would allow, so that worlds differ in looks and not in motion.
    game.add_game_args("+sv_cheats 1")  # Nightmare, the skill of some scenarios, would refuse the commands below.
    game.set_available_buttons(
        [button.MOVE_FORWARD_BACKWARD_DELTA, button.MOVE_LEFT_RIGHT_DELTA, button.TURN_LEFT_RIGHT_DELTA, button.ATTACK]
    )
    variable = vizdoom.GameVariable
    game.set_available_game_variables([variable.VELOCITY_X, variable.VELOCITY_Y, variable.ANGLE, variable.SECRETCOUNT])
    game.set_episode_timeout(0)  # None.
    game.set_seed(seed)
    try:
        game.init()
        game.send_game_command("god")  # Or a clip would be likelier the less happens in it: the player has to live on.
        yield game
    finally:
        game.close()


def step(game, action: Action, tics: int) -> None:
    """Hold an action for some tics. Idle means to brake first: a player who only lets go slides on for a second."""
    for _ in range(tics):
        if game.is_episode_finished():
            return
        if action == IDLE:
            speed_x, speed_y, angle, _ = game.get_state().game_variables
            sin, cos = math.sin(math.radians(angle)), math.cos(math.radians(angle))
            forward, right = speed_x * cos + speed_y * sin, speed_x * sin - speed_y * cos
            push = [min(50.0, max(-50.0, -speed / SPEED_PER_PUSH)) for speed in (forward, right)]
            game.make_action([*push, 0.0, 0.0], 1)
        else:
            game.make_action(list(action), 1)


def go_somewhere(game, rng: np.random.Generator) -> None:
    """Put the player where something lies or lives in a map, facing one of the more open directions.

    A walk of a few seconds from the start of a map would show the same room in all of its clips.
    """
    places = ("Ammo", "Armor", "Health", "Key", "Monster", "Powerup", "Weapon")
    targets = [thing for thing in game.get_state().objects if thing.category in places]
    target = targets[rng.integers(len(targets))]
    game.send_game_command(f"warp {target.position_x:.0f} {target.position_y:.0f}")
    step(game, (0.0, 0.0, rng.uniform(0.0, 360.0), 0.0), 1)
    depths = []
    for _ in range(8):
        if game.is_episode_finished():
            return
        depths.append(float(game.get_state().depth_buffer.mean()))
        step(game, (0.0, 0.0, 45.0, 0.0), 1)
    heading = int(rng.choice(np.argsort(depths, kind="stable")[-3:]))
    step(game, (0.0, 0.0, 45.0 * heading, 0.0), 1)


def play(name: str, recipe: Recipe, seed: int, attempt: int, scratch: Path) -> np.ndarray | None:
    """One episode's frames as uint8 (F, H, W, 3), or None if the episode is of no use.

    That is one that ended before the last frame, or in which a secret place was entered.

    The frames follow a warm-up of 0.6 to 2 seconds, so that clips start at different places and with a raised weapon.
    """
    world = WORLDS[name]
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed, attempt])
    with running_game(world, recipe, int(rng.integers(2**31)), scratch) as game:
        if world.map:
            go_somewhere(game, rng)
        for action in draw_actions(int(rng.integers(WARM_UP[0], WARM_UP[1] + 1)), rng):
            step(game, action, 1)
        frames = []
        for action in draw_actions(recipe.frames, rng):
            if game.is_episode_finished() or game.is_player_dead():
                return None
            state = game.get_state()
            if state.game_variables[-1] > 0:  # "A secret is revealed!" stands across the picture for seconds.
                return None
            frames.append(np.array(state.screen_buffer))  # A copy: the engine draws over its buffer.
            step(game, action, recipe.frame_skip)
    return np.stack(frames)  # (F, H, W, 3)


def make_frames(name: str, recipe: Recipe, seed: int, scratch: Path) -> tuple[np.ndarray, int]:
    """The frames of one clip, uint8 (F, H, W, 3), and the number of the attempt that lasted long enough, from 0.

    Raises:
        EpisodeError: if each of `MAX_ATTEMPTS` episodes ended early.
    """
    for attempt in range(MAX_ATTEMPTS):
        frames = play(name, recipe, seed, attempt, scratch)
        if frames is not None:
            return resize(frames, *recipe.size), attempt
    tics = recipe.frames * recipe.frame_skip
    raise EpisodeError(f"no episode of {MAX_ATTEMPTS} lasted {tics} tics; ask for fewer frames or a smaller skip")


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames (F, H, W, 3) averaged down to (F, height, width, 3)."""
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack(
        [
            av.VideoFrame.from_ndarray(frame, format="rgb24")
            .reformat(width=width, height=height, interpolation=Interpolation.AREA)
            .to_ndarray()
            for frame in frames
        ]
    )
