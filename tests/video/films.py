"""Video files for the tests, made by PyAV: frame n shows the number n in 12 black or white fields, which
survive compression and resizing; so a test can say exactly which frames it was given."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ROWS, COLUMNS = 3, 4  # the fields; number < 2^12


def picture(number, width, height):
    """uint8 (height, width, 3)."""
    fields = np.array([number >> bit & 1 for bit in range(ROWS * COLUMNS)]).reshape(ROWS, COLUMNS)
    rows, columns = np.arange(height) * ROWS // height, np.arange(width) * COLUMNS // width
    grey = np.where(fields[rows][:, columns], 220, 30).astype(np.uint8)
    return grey[..., None].repeat(3, axis=2)


def numbers(frames):
    """(T, H, W, 3) -> the numbers that they show, read from the middle of each field."""
    frames = np.asarray(frames)
    height, width = frames.shape[1:3]
    found = np.zeros(len(frames), dtype=int)
    for bit in range(ROWS * COLUMNS):
        row, column = divmod(bit, COLUMNS)
        rows = slice(int((row + 0.3) * height / ROWS), int((row + 0.7) * height / ROWS))
        columns = slice(int((column + 0.3) * width / COLUMNS), int((column + 0.7) * width / COLUMNS))
        found |= (frames[:, rows, columns].mean((1, 2, 3)) > 125).astype(int) << bit
    return found.tolist()


def write_film(path, count, fps=30, size=(160, 90), codec="libx264", milliseconds=(), rotation=0, **options):
    """`count` numbered frames, fps a second or, with `milliseconds`, each at its own time. rotation: degrees
    by which a player is told to turn them. options: the encoder's, and movflags. Returns the path."""
    options = {"preset": "ultrafast", **options} if codec in ("libx264", "libx265") else options
    options = {name.replace("_", "-"): str(value) for name, value in options.items()}
    muxer = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", options=muxer) as file:
        stream = file.add_stream(codec, rate=Fraction(fps), options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        stream.codec_context.thread_count = 1
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


def write_sound(path):
    """A second of silence without a picture."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


def cut(source, path, seconds=0.0, packets=0):
    """ffmpeg -ss SECONDS -i SOURCE -c copy PATH: the packets from the key frame before on, their times
    counted from the cut; an mp4 then says that those with times below zero are not shown. `packets`: so many
    are left out at the beginning, as by a cut that does not care for key frames."""
    with av.open(source) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        begin = round(seconds / stream.time_base)
        old.seek(begin, stream=stream, backward=True)
        for packet in [packet for packet in old.demux(stream) if packet.dts is not None][packets:]:
            packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.dts - begin, copy
            new.mux(packet)
    return str(path)


def decode(path):
    """What PyAV shows, an independent reader: [seconds from the first frame], [number]."""
    with av.open(path) as file:
        frames = [(float(f.time), f.to_ndarray(format="rgb24")) for f in file.decode(video=0)]
    return [time - frames[0][0] for time, _ in frames], numbers([pixels for _, pixels in frames])


def end_early(source, path, seconds):
    """The same mp4 with an edit list that ends after so many seconds: players show no later frame."""
    content = bytearray(Path(source).read_bytes())
    clock = int.from_bytes(content[(at := content.index(b"mvhd") + 16) : at + 4], "big")  # ticks a second
    edits = content.index(b"elst") + 8  # their number, then duration, begin, speed of each
    assert content[edits : edits + 4] == b"\0\0\0\1"
    content[edits + 4 : edits + 8] = int(seconds * clock).to_bytes(4, "big")
    Path(path).write_bytes(content)
    return str(path)


def empty_packet(source, path, number):
    """The same MPEG-4 film of 25 frames a second in which a packet holds no frame, as Xvid drops frames."""
    with av.open(source) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for k, packet in enumerate(packet for packet in old.demux(stream) if packet.dts is not None):
            if k == number:  # a frame of type P, its time, "not coded" (ISO 14496-2, 6.2.5)
                bits = int(f"0101{number % 25:05b}1001111", 2)
                empty = av.Packet(b"\0\0\1\xb6" + bits.to_bytes(2, "big"))
                for name in ("pts", "dts", "duration", "time_base"):
                    setattr(empty, name, getattr(packet, name))
                packet = empty
            packet.stream = copy
            new.mux(packet)
    return str(path)


def cut_off(source, path, share):
    """Its first bytes, such as a share of 0.9."""
    content = Path(source).read_bytes()
    Path(path).write_bytes(content[: int(share * len(content))])
    return str(path)
